"""The demonstration's picture: how far every rank's load is from the mean, in three stages."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lplb_jax._report import Layer

# Okabe and Ito's colours, which colour-blind readers tell apart too.
STAGES = {"no replicas": "#7f7f7f", "even split": "#d55e00", "rebalance": "#0072b2"}
INK, FAINT = "#222222", "#777777"


def draw(layers: list[Layer], topology: str) -> Figure:
    """A panel per layer with the rank loads without replicas, evenly split and after `rebalance`.

    Args:
      layers: `lplb_jax.demo.Layer` results, at least one.
      topology: its name, for the caption.

    Returns:
      A Matplotlib figure.

    >>> from lplb_jax._picture import draw
    >>> from lplb_jax.demo import Layer
    >>> loads = np.array([30, 10]), np.array([20, 20])
    >>> len(draw([Layer(loads[0], loads[0], loads[1], 20, 10, 1e-3, [])], "ring").axes)
    1
    """
    n_columns = min(2, len(layers))
    n_rows = -(-len(layers) // n_columns)
    figure = Figure(figsize=(5 * n_columns, 2.9 * n_rows + 1.0), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, rect=(0, 0.05, 1, 0.89))
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
    for i, (panel, layer) in enumerate(zip(panels, layers, strict=False)):
        _draw_layer(panel, layer, f"Layer {i}", explain=i == 0)
    for panel in panels[len(layers) :]:
        panel.axis("off")

    home, even, balanced = np.mean([layer.busiest for layer in layers], axis=0)
    figure.text(
        0.015,
        0.98,
        f"Busiest of {len(layers[0].home)} ranks, average of {len(layers)} layers: "
        f"{home:.2f} × mean load → {balanced:.2f} after rebalance (even split: {even:.2f})",
        va="top",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.015,
        0.015,
        f"One dot per rank ({topology} topology), its tokens over the mean. Even split: half of an "
        f"expert's tokens to each copy.",
        fontsize=8.5,
        color=FAINT,
    )
    return figure


def _draw_layer(panel: Axes, layer: Layer, title: str, *, explain: bool) -> None:
    n_ranks = len(layer.home)
    bound = layer.lower_bound / layer.home.mean()
    starts = np.arange(3) * (n_ranks + 3)
    for stage, (start, (name, colour)) in enumerate(zip(starts, STAGES.items(), strict=True)):
        loads = layer.over_mean[stage]
        ranks = start + np.arange(n_ranks)
        panel.vlines(ranks, 1, loads, color=colour, linewidth=2.5)
        panel.plot(ranks, loads, "o", color=colour, markersize=6.5)
        centre = start + (n_ranks - 1) / 2
        # Where all ranks are equally busy, none of them is the one to label.
        at = centre if stage == 2 else ranks[loads.argmax()]
        panel.annotate(
            f"{loads.max():.2f}",
            (at, loads.max()),
            (0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10.5,
            fontweight="bold",
            color=INK,
        )
        panel.text(
            centre,
            -0.02,
            name,
            transform=panel.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=10,
            fontweight="bold",
            color=colour,
        )
    panel.axhline(1, color=INK, linewidth=0.8, zorder=1)
    left, right = starts[2] - 1.2, starts[2] + n_ranks + 0.2
    panel.plot(
        (left, right), (bound, bound), color=INK, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1
    )
    if explain:
        panel.text(right + 0.3, bound, "lower\nbound", va="bottom", fontsize=8.5, color=INK)
        panel.text(right + 0.3, 1, "mean", va="top", fontsize=8.5, color=INK)
    panel.set_title(
        f"{title}: busiest rank {layer.busiest[0]:.2f} → {layer.busiest[2]:.2f} × mean",
        loc="left",
        fontsize=10.5,
        color=INK,
    )
    panel.set_xticks([])
    panel.set_xlim(-1.5, right + 3.6)
    panel.tick_params(axis="y", length=0, labelcolor=FAINT, labelsize=8.5)
    panel.margins(y=0.17)
    panel.spines[:].set_visible(False)
    panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    panel.set_axisbelow(True)
