"""The picture of an `Advice`: balance against copies, ranks before and after, and age."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lplb_jax._picture import FAINT, INK
from lplb_jax._study import ANY, BATCH, EVEN, GIVEN, PACKED, Ageing, Choice

# Okabe and Ito's colors, which color-blind readers can distinguish.
_COLOURS = {ANY: "#0072b2", BATCH: "#009e73", EVEN: "#d55e00"}
_TOPOLOGIES = ("#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#7f7f7f", "#b8a200")
_BEFORE, _AFTER = "#7f7f7f", "#0072b2"


def draw(
    choices: Sequence[Choice],
    best: Choice,
    ageing: Ageing | None,
    before: Sequence[int],
    after: Sequence[int],
) -> Figure:
    """Three panels, or two if nothing is known about age; arguments as in `Advice`.

    >>> import lplb_jax
    >>> from lplb_jax._advice_picture import draw
    >>> found = lplb_jax.advise(np.array([[[90, 10, 10, 10]] * 4]), ep_size=2)
    >>> len(draw(found.choices, found.recommended, None, found.before, found.after).axes)
    2
    """
    n_panels = 2 if ageing is None else 3
    figure = Figure(figsize=(4.9 * n_panels, 4.5), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 0.92))
    panels = figure.subplots(1, n_panels)
    _balance(panels[0], choices, best)
    _ranks(panels[1], before, after)
    if ageing is not None:
        _age(panels[2], ageing)
    slots = f"{best.redundants} redundant slot{'s' * (best.redundants != 1)} per rank"
    figure.text(
        0.012,
        0.975,
        f"Recommended: {best.placement}, {slots}: busiest rank {choices[0].mean:.2f} → "
        f"{best.mean:.2f} × mean",
        va="top",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    return figure


def _balance(panel: Axes, choices: Sequence[Choice], best: Choice) -> None:
    """The largest over the mean load by redundant slots, one line per kind."""
    given, packed, *tried = choices
    panel.plot([0, 0], [given.mean, packed.mean], "s", color=INK, markersize=6)
    same = given.mean - packed.mean < 0.04 * (given.mean - 1)
    for choice in (packed,) if same else (given, packed):
        name = f"{GIVEN}, {PACKED}" if same else choice.placement
        at = (0, choice.mean)
        panel.annotate(f"{name}: no copies", at, (8, 2), textcoords="offset points", fontsize=8.5)
    along = iter(_TOPOLOGIES)
    for kind in dict.fromkeys(choice.placement for choice in tried):
        points = [choice for choice in tried if choice.placement == kind]
        colour = _COLOURS.get(kind) or next(along)
        x = [0] + [choice.redundants for choice in points]
        y = [packed.mean] + [choice.mean for choice in points]
        panel.plot(x, y, "-o", color=colour, markersize=4, linewidth=1.6, label=kind)
    panel.plot(best.redundants, best.mean, "o", markersize=13, fillstyle="none", color=INK)
    panel.legend(fontsize=8.5, frameon=False, loc="upper right")
    panel.set_xticks(sorted({choice.redundants for choice in choices}))
    panel.set_xlabel("redundant slots per rank", fontsize=9, color=FAINT)
    _frame(panel, "Busiest rank's load / mean, later batches")


def _ranks(panel: Axes, before: Sequence[int], after: Sequence[int]) -> None:
    """Every rank's tokens in one batch, sorted."""
    mean = np.mean(before)
    for loads, colour, name in (
        (before, _BEFORE, GIVEN),
        (after, _AFTER, "recommended"),
    ):
        panel.step(
            np.arange(len(loads) + 1),
            np.append(np.sort(loads)[::-1], np.min(loads)) / mean,
            where="post",
            color=colour,
            linewidth=2,
            label=f"{name}: {max(loads) / mean:.2f}",
        )
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8.5, frameon=False, loc="lower left")
    panel.set_xlabel("ranks, busiest first", fontsize=9, color=FAINT)
    _frame(panel, "Tokens of every rank / mean, one batch")


def _age(panel: Axes, ageing: Ageing) -> None:
    """How a fixed placement falls behind a fresh one."""
    placement, redundants, age, kept, fresh, refresh_after = ageing
    panel.plot(age, kept, "-o", color=_COLOURS[EVEN], markersize=4, label="placed once")
    panel.plot(age, fresh, "-o", color=_AFTER, markersize=4, label="placed anew before each span")
    if refresh_after is not None:
        panel.axvline(refresh_after, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        panel.annotate(
            f"refresh after {refresh_after}",
            (refresh_after, 0),
            (4, 5),
            xycoords=panel.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=8.5,
        )
    panel.margins(y=0.25)
    panel.legend(fontsize=8.5, frameon=False, loc="upper left")
    panel.set_xlabel("batches since it was placed", fontsize=9, color=FAINT)
    _frame(panel, f"Load / mean by age: {placement}, {redundants} slots")


def _frame(panel: Axes, title: str) -> None:
    panel.axhline(1, color=INK, linewidth=0.8, zorder=1)
    panel.set_title(title, loc="left", fontsize=10.5, color=INK)
    panel.tick_params(length=0, labelcolor=FAINT, labelsize=8.5)
    panel.spines[:].set_visible(False)
    panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    panel.set_axisbelow(True)
