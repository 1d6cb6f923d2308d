"""Draws the pictures of these pages: `python docs/figures.py [folder]`, by default docs/images.

How it works and what 64 ranks gain is computed by the library, on a CPU; the others show the
figures in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lplb_jax import Placement, metrics, place_copies, place_experts, solve
from lplb_jax.data import load_traces

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
# Okabe and Ito's colours, which colour-blind readers tell apart too.
GREY, RED, BLUE, GREEN, PINK = "#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7"
INK, FAINT, PALE = "#222222", "#777777", "#e8e8e8"

Point = tuple[float, float]


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes in every run, and text that can be searched.
    mpl.rcParams.update({"svg.hashsalt": "lplb_jax", "svg.fonttype": "none", "font.size": 10})
    for name, draw in PICTURES.items():
        path = folder / f"{name}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(path)


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def sheet(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=FAINT, color=PALE)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def ranks_64() -> Figure:
    """The ranks of one layer from the packaged traces, fullest first, by kind of placement."""
    n_ranks, layer, traces = 64, 0, load_traces()
    n_logical = traces.history.shape[1]
    indices = np.asarray(traces.indices[layer]).ravel()
    loads = np.bincount(indices, minlength=n_logical).astype(np.int32)
    past = traces.history[layer]

    def placed(slots: int, **options: Any) -> Placement:
        return place_experts(
            past, n_logical=n_logical, ep_size=n_ranks, redundants_per_rank=slots, **options
        )

    eplb, anywhere = placed(2, method="eplb"), placed(2)
    exact = [solve(loads, placement=p).quota for p in (anywhere, place_copies(loads, anywhere))]
    quotas = {
        "no copies": (metrics.home_quota(loads, placed(0, method="eplb")), GREY),
        "EPLB, even split": (metrics.even_quota(loads, eplb), RED),
        "place_experts, exact": (exact[0], BLUE),
        "copies per batch, exact": (exact[1], GREEN),
    }
    figure = sheet(11, 2.9)
    panels = figure.subplots(1, len(quotas), sharey=True)
    for panel, (name, (quota, colour)) in zip(panels, quotas.items(), strict=True):
        of_ranks = np.asarray(metrics.rank_loads(quota, n_ranks), float)
        over_mean = np.sort(of_ranks / of_ranks.mean())[::-1]
        plain(panel, name)
        panel.bar(np.arange(n_ranks), over_mean, width=1, color=colour)
        panel.axhline(1, color=INK, linewidth=0.8)
        panel.text(n_ranks, over_mean[0], f"busiest: {over_mean[0]:.2f} × mean", color=colour,
                   ha="right", va="bottom", fontweight="bold")  # fmt: skip
        panel.set_xticks([])
        panel.set_xlabel("64 ranks, fullest first", color=FAINT)
    panels[0].set_ylabel("tokens / mean", color=FAINT)
    panels[0].margins(y=0.15)
    return figure


# Four ranks, some experts of each with copies on the next: loads, and what moves along. From rank 1
# no more can move: 40 tokens are all that its copied experts have.
LOADS, MOVES = (90, 70, 30, 10), (30, 40, 20, 0)


def steps() -> Figure:
    """The four steps of rebalance, and who takes them."""
    figure = sheet(11, 1.9)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 1.9)
    boxes = [
        ("count", "every rank counts\nits own tokens\nper expert", BLUE),
        ("sync", "all ranks exchange\ncounts: an int32\nper expert and rank", PINK),
        ("solve", "every rank finds the\nsame quota per slot,\nand the bound", GREEN),
        ("assign", "every rank gives its\nown tokens to slots,\nquota by quota", BLUE),
    ]
    axes.text(0.05, 0.85, "indices\n(experts)", va="center", ha="left", color=INK)
    for i, (name, what, colour) in enumerate(boxes):
        left = 1.2 + 2.2 * i
        shape = FancyBboxPatch((left, 0.15), 1.75, 1.4, boxstyle="round,pad=0.05",
                               facecolor="white", edgecolor=colour, linewidth=1.5)  # fmt: skip
        axes.add_patch(shape)
        axes.text(left + 0.87, 1.33, name, ha="center", va="center", color=colour,
                  fontweight="bold", fontsize=12)  # fmt: skip
        axes.text(left + 0.87, 0.65, what, ha="center", va="center", color=INK, fontsize=9)
        arrow(axes, (left - 0.4, 0.85), (left - 0.05, 0.85), FAINT)
    arrow(axes, (9.6, 0.85), (9.95, 0.85), FAINT)
    axes.text(10.05, 0.85, "physical\nindices\n(slots)", va="center", ha="left", color=INK)
    return figure


def arrow(axes: Axes, start: Point, end: Point, colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14,
                                   color=colour, linewidth=1.6, shrinkA=0, shrinkB=0))  # fmt: skip


def flow() -> Figure:
    """Tokens that move along a chain of copies until no rank has more than the target."""
    figure = sheet(8, 3.2)
    axes = figure.subplots()
    axes.set_axis_off()
    loads, moves = np.array(LOADS), np.array(MOVES)
    after = loads - moves + np.roll(moves, 1)
    target = int(after.max())
    axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(3.95, target + 2, f"target {target}", color=INK, ha="right")
    for rank, (load, now) in enumerate(zip(loads, after, strict=True)):
        axes.bar(rank - 0.2, load, 0.34, color="#cfcfcf")
        axes.bar(rank + 0.2, now, 0.34, color=BLUE)
        axes.text(rank - 0.2, load + 2, str(load), ha="center", color=FAINT)
        axes.text(rank + 0.2, now - 3, str(now), ha="center", va="top", color="white")
        axes.text(rank, -9, f"rank {rank}", ha="center", color=INK)
        if moves[rank]:
            arrow(axes, (rank + 0.42, 22), (rank + 0.62, 22), RED)
            label = f"{moves[rank]}" + ", all" * (rank == 1)
            axes.text(rank + 0.5, 27, label, ha="center", color=RED, fontsize=9)
    axes.set_xlim(-0.6, 4)
    axes.set_ylim(-14, 104)
    axes.set_title("Grey: tokens of own experts. Red: moved to the copy on the next rank. Blue: "
                   "after.", loc="left", fontsize=10.5)  # fmt: skip
    return figure


def cut() -> Figure:
    """Why no routing of these tokens goes below the target."""
    figure = sheet(8, 2.9)
    axes = figure.subplots()
    axes.set_axis_off()
    places = {0: (1.2, 1.9), 1: (3.0, 1.9), 2: (5.4, 1.9), 3: (7.0, 1.9)}
    stay = FancyBboxPatch((0.45, 1.05), 3.3, 1.55, boxstyle="round,pad=0.1", facecolor="#fdeee4",
                          edgecolor=RED, linewidth=1.4, linestyle="--")  # fmt: skip
    axes.add_patch(stay)
    for rank, load in enumerate(LOADS):
        x, y = places[rank]
        axes.plot(x, y, "o", markersize=44, color="white", markeredgecolor=INK, markeredgewidth=1.3)
        axes.text(x, y, f"rank {rank}\n{load}", ha="center", va="center", fontsize=9)
    arrow(axes, (1.65, 1.9), (2.55, 1.9), BLUE)
    axes.text(2.1, 2.05, "up to 50", ha="center", color=BLUE, fontsize=9)
    arrow(axes, (3.45, 1.9), (4.95, 1.9), BLUE)
    axes.text(4.35, 2.05, "up to 40", ha="center", color=BLUE, fontsize=9)
    arrow(axes, (5.85, 1.9), (6.55, 1.9), BLUE)
    axes.text(6.2, 2.05, "up to 20", ha="center", color=BLUE, fontsize=9)
    why = (
        "Ranks 0 and 1 have 160 tokens, of which 40 can leave them. The other 120 stay on\n"
        "two ranks, so one of them has at least ⌈120 / 2⌉ = 60, at any routing. The mean is 50."
    )
    axes.text(0.45, 0.55, why, va="center", color=INK)
    axes.set_xlim(0, 8)
    axes.set_ylim(0.1, 2.8)
    return figure


def layer_times() -> Figure:
    """ms of a layer, forward and backward, by imbalance and by how copies are used."""
    figure = sheet(9, 3.2)
    kinds = {
        "none": ("no copies", GREY),
        "eplb": ("even split", RED),
        "lplb": ("exact", BLUE),
        "batch": ("copies per batch, exact", GREEN),
    }
    files = {"4096": "moe_layer_4096_peer_h200x2", "2048": "moe_layer_2048_transports_h200x2"}
    for axes, (hidden, file) in zip(figure.subplots(1, 2), files.items(), strict=True):
        found = results(file)
        width = found["options"]["width"]
        plain(axes, f"{hidden} × {width}, two H200s")
        by_peer = [case for case in found["results"] if not case["case"].endswith("ragged")]
        for i, (kind, (label, colour)) in enumerate(kinds.items()):
            times = [case[kind]["ms"] for case in by_peer]
            bars = axes.bar(np.arange(len(times)) + 0.22 * (i - 1.5), times, 0.2, color=colour,
                            label=label)  # fmt: skip
            axes.bar_label(bars, fmt="%.1f", fontsize=7, color=colour)
        axes.set_xticks(range(3), [f"{x} × mean" for x in found["options"]["imbalances"]])
        axes.set_xlabel("busiest rank without copies", color=FAINT)
        axes.set_ylabel("ms", color=FAINT)
        axes.margins(y=0.14)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4,
                  frameon=False)  # fmt: skip
    return figure


def balancer_times() -> Figure:
    """µs of rebalance by number of indices, and of XLA's and our own exchange of counts."""
    figure = sheet(9, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    found = results("balancer_h200")
    curve = {int(k.split("/")[1]): v for k, v in found.items() if k.startswith("cube/")}
    plain(left, "rebalance, one H200, kernel alone")
    left.plot(list(curve), list(curve.values()), "o-", color=BLUE)
    left.set(xscale="log", yscale="log", xlabel="indices", ylabel="µs")
    left.set_yticks([4, 10, 30, 100], ["4", "10", "30", "100"])
    synced = results("load_sync_p2p_h200x2")["microseconds"]
    names = {
        "lax.all_gather, a row": "counts by lax.all_gather",
        "sync_loads, a row": "counts by sync_loads",
        "rebalance, lax.all_gather": "rebalance with lax.all_gather",
        "rebalance, comm": "rebalance(comm=comm)",
    }
    plain(right, "two H200s, µs per call in a jitted program")
    bars = right.barh(list(names.values()), [synced[name] for name in names],
                      color=[GREY, BLUE, GREY, BLUE])  # fmt: skip
    right.bar_label(bars, fmt=" %.1f", fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.12)
    right.grid(visible=False)
    return figure


def solver_times() -> Figure:
    """µs of one solve: the exact solver, the interior point, and with cuSolverDx's Cholesky."""
    figure = sheet(9, 3.2)
    axes = figure.subplots()
    ours, theirs = results("solver_h200"), results("solver_cusolverdx_h200")
    shapes = [name for name, value in ours.items() if isinstance(value, dict) and "exact" in value]
    rows = {
        "exact": ("exact", ours, BLUE),
        "ipm": ("interior point", ours, GREEN),
        "ipm, cuSolverDx": ("interior point, cuSolverDx (as LPLB)", theirs, RED),
    }
    plain(axes, "One solve on an H200, mean over 200 instances")
    for i, (key, (label, found, colour)) in enumerate(rows.items()):
        have = [n for n, shape in enumerate(shapes) if key in found.get(shape, {})]
        times = [found[shapes[n]][key]["mean"] for n in have]
        bars = axes.bar(np.array(have) + 0.27 * (i - 1), times, 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, color=colour)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("µs", color=FAINT)
    axes.legend(frameon=False)
    axes.set_yscale("log")
    axes.margins(y=0.1)
    return figure


def placements() -> Figure:
    """Largest over mean rank load on held-out batches, by number of ranks."""
    figure = sheet(9, 3.2)
    lines: dict[str, tuple[str, str, Callable[[], dict]]] = {
        "EPLB even": ("EPLB, even split", RED, lambda: results("placements")),
        "EPLB exact": ("EPLB, exact", PINK, lambda: results("placements")),
        "auto": ("place_experts, exact", BLUE, lambda: results("placements")),
        "batch": ("copies per batch, exact", GREEN, lambda: results("batch_copies")),
    }
    for axes, loads in zip(figure.subplots(1, 2, sharey=True), ("stale", "small batches"),
                           strict=True):  # fmt: skip
        plain(axes, {"stale": "placed by old loads", "small batches": "small batches"}[loads])
        for key, (label, colour, read) in lines.items():
            rows = [r for r in read()["rows"] if r["loads"] == loads and r["slots"] == 2]
            axes.plot([r["ranks"] for r in rows], [r[key] for r in rows], "o-", color=colour,
                      label=label)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        axes.set_xlabel("ranks, two redundant slots each", color=FAINT)
    figure.axes[0].set_ylabel("busiest rank / mean", color=FAINT)
    figure.axes[0].legend(frameon=False)
    return figure


def training() -> Figure:
    """One model trained with each kind of balance: what it learns, and the busiest rank."""
    found = results("training_cpu8")
    kinds = {
        "none": ("no copies", GREY, "-"),
        "eplb": ("EPLB's even split", RED, "--"),
        "lplb": ("along a topology, exact", BLUE, "-."),
        "batch": ("copies per batch, exact", GREEN, ":"),
    }
    figure = sheet(11, 3.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.6, 0.9))
    plain(left, "What is learnt: all four coincide")
    plain(middle, f"Busiest of {found['ranks']} ranks / mean")
    plain(right, "Tokens per second")
    for i, (kind, (label, colour, style)) in enumerate(kinds.items()):
        curves = found["results"][kind]
        steps = found["every"] * np.arange(len(curves["bits_per_byte"]))
        left.plot(steps, curves["bits_per_byte"], style, color=colour, linewidth=2.6 - 0.4 * i)
        middle.plot(steps, curves["imbalance_after"], color=colour, linewidth=1.6)
        last = float(np.mean(curves["imbalance_after"][-5:]))
        middle.annotate(f"{label}: {last:.2f}", (1, last), (6, 0), color=colour, va="center",
                        xycoords=middle.get_yaxis_transform(), textcoords="offset points",
                        fontsize=9, annotation_clip=False)  # fmt: skip
        bar = right.barh(i, curves["tokens_per_second"], color=colour)
        right.bar_label(bar, fmt=" %d", fontsize=9, color=colour)
    left.set_ylabel("bits per byte", color=FAINT)
    middle.axhline(1, color=INK, linewidth=0.8)
    middle.set_ylim(bottom=0.9)
    for axes in (left, middle):
        axes.set_xlabel("step", color=FAINT)
    right.set_yticks([])
    right.invert_yaxis()
    right.margins(x=0.25)
    right.grid(visible=False)
    right.set_xticks([])
    if found["device"] == "virtual CPU":
        why = "virtual devices share\ntheir cores: even ranks\nsave no time"
        right.set_xlabel(why, color=FAINT, fontsize=9)
    return figure


PICTURES = {
    "ranks_64": ranks_64,
    "steps": steps,
    "flow": flow,
    "cut": cut,
    "layer_times": layer_times,
    "balancer_times": balancer_times,
    "solver_times": solver_times,
    "placements": placements,
    "training": training,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=HERE / "images")
    jax.config.update("jax_platforms", "cpu")
    main(parser.parse_args().folder)
