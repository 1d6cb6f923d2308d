"""The demo's picture: every rank's load relative to the mean, stage by stage."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lplb_jax._report import Layer

# Okabe and Ito's colors, which color-blind readers can distinguish.
COLOURS = "#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7"
INK, FAINT = "#222222", "#777777"


def draw(layers: list[Layer], topology: str) -> Figure:
    """One panel per layer: rank loads without replicas, evenly split, and after each `rebalance`.

    Args:
      layers: `lplb_jax.demo.Layer` results, at least one.
      topology: name of the topology, for the captions.

    Returns:
      A Matplotlib figure.

    >>> from lplb_jax._picture import draw
    >>> from lplb_jax.demo import Layer, Run
    >>> loads, run = np.array([30, 10]), Run("ring", np.array([20, 20]), 20, 1, 10, 1e-3, [])
    >>> len(draw([Layer(loads, loads, (run, run, run))], "ring").axes)
    1
    """
    n_columns = min(2, len(layers))
    n_rows = -(-len(layers) // n_columns)
    figure = Figure(figsize=(7 * n_columns, 2.9 * n_rows + 1.1), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12, rect=(0, 0.065, 1, 0.875))
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
    for i, (panel, layer) in enumerate(zip(panels, layers, strict=False)):
        _draw_layer(panel, layer, f"Layer {i}", explain=i == 0)
    for panel in panels[len(layers) :]:
        panel.axis("off")

    home, even, *after = np.mean([layer.busiest for layer in layers], axis=0)
    names = [run.name for run in layers[0].runs]
    figures = ", ".join(f"{load:.2f} {name}" for load, name in zip(after, names, strict=True))
    figure.text(
        0.015,
        0.985,
        f"Busiest of {len(layers[0].home)} ranks, average of {len(layers)} layers: {home:.2f} × "
        f"mean load → {figures}",
        va="top",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.015,
        0.015,
        f"One dot per rank, its tokens over the mean; dashes: the lower bound. Even split: half of "
        f"an expert's tokens to each copy along the {topology} ({even:.2f} on average).\n"
        f"Any placement: as many copies, of any expert on any rank. Batch: at most as many, chosen "
        f"for the tokens at hand.",
        fontsize=8.5,
        color=FAINT,
    )
    return figure


def _draw_layer(panel: Axes, layer: Layer, title: str, *, explain: bool) -> None:
    n_ranks = len(layer.home)
    names = "no replicas", "even split", *(f"rebalance,\n{run.name}" for run in layer.runs)
    starts = np.arange(len(names)) * (n_ranks + 3)
    for stage, (start, name, colour) in enumerate(zip(starts, names, COLOURS, strict=False)):
        loads = layer.over_mean[stage]
        ranks = start + np.arange(n_ranks)
        panel.vlines(ranks, 1, loads, color=colour, linewidth=2.5)
        panel.plot(ranks, loads, "o", color=colour, markersize=6.5)
        centre = start + (n_ranks - 1) / 2
        # If all ranks are equally busy, there is no busiest rank to label.
        at = centre if stage >= 2 else ranks[loads.argmax()]
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
    right = starts[-1] + n_ranks + 0.2
    for start, run in zip(starts[2:], layer.runs, strict=True):
        bound = run.lower_bound / layer.home.mean()
        span = start - 1.2, start + n_ranks + 0.2
        panel.plot(span, (bound, bound), color=INK, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)
    if explain:
        panel.text(right + 0.3, 1.005, "mean", va="bottom", fontsize=8.5, color=INK)
    panel.set_title(title, loc="left", fontsize=10.5, color=INK)
    panel.set_xticks([])
    panel.set_xlim(-1.5, right + 3.6)
    panel.tick_params(axis="y", length=0, labelcolor=FAINT, labelsize=8.5)
    panel.margins(y=0.17)
    panel.spines[:].set_visible(False)
    panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    panel.set_axisbelow(True)
