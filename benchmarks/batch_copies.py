"""Compares copies chosen for every batch (`place_copies`) with none and with the best static ones.

    python benchmarks/batch_copies.py [--ranks 8 16 32 64] [--slots 1 2] [--json out.json]

256 experts; largest over mean rank load, balanced exactly, over batches and instances:

    none     experts packed onto ranks by the history, no copies
    static   `place_experts` without r2o, from the history
    batch    mean, and largest, with the same homes as `none`
    copies   mean number used, over all ranks
    fan-out  the most copies of its experts that a rank sends
    limit 4  the mean if no rank sends more than four

Loads: the packaged traces as in `placements.py`; Zipf's law with exponents 1 to 2; and one expert
with 10, 20 or 45 times the mean. The history says nothing about the latter two. us: time of one
call on the CPU, with 64 calls in one program. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import record
from placements import ASSIGNMENTS, EXPERTS, Instance, even, traces

from lplb_jax import Placement, place_copies, place_experts, solve

COLUMNS = ("none", "static", "batch", "largest", "copies", "fan-out", "limit 4", "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    instances = [*traces(), *unknown(np.random.default_rng(args.seed))]
    rows = []
    print(f"{'loads':16}{'ranks':>6}{'slots':>6}" + "".join(f"{name:>9}" for name in COLUMNS))
    for name in dict.fromkeys(instance.name for instance in instances):
        of_name = [instance for instance in instances if instance.name == name]
        for n_ranks in args.ranks:
            for n_slots in args.slots:
                figures = np.concatenate([judge(one, n_ranks, n_slots) for one in of_name])
                row = figures.mean(axis=0)
                row[[3, 5]] = figures.max(axis=0)[[3, 5]]
                rows.append([name, n_ranks, n_slots, *row.round(4).tolist()])
                numbers = "".join(f"{number:9.3f}" for number in row)
                print(f"{name:16}{n_ranks:6}{n_slots:6}{numbers}", flush=True)
    if args.json:
        keys = ("loads", "ranks", "slots", *COLUMNS)
        table = [dict(zip(keys, row, strict=True)) for row in rows]
        record.write(args.json, {"seed": args.seed, "rows": table})


def unknown(rng: np.random.Generator) -> Iterator[Instance]:
    """Loads about which the history, all ones, says nothing."""

    def instance(name: str, weight: np.ndarray) -> Instance:
        loads = rng.multinomial(ASSIGNMENTS, weight / weight.sum(), size=4)
        return Instance(name, np.ones((1, EXPERTS)), loads)

    for _ in range(16):
        for exponent in (1.0, 1.25, 1.5, 2.0):
            zipf = np.arange(1, EXPERTS + 1) ** -exponent
            yield instance(f"Zipf {exponent}", rng.permutation(zipf))
        for times in (10, 20, 45):
            hot = rng.gamma(4, 1, EXPERTS)
            hot[rng.integers(EXPERTS)] = times * hot.mean()
            yield instance(f"one expert {times}x", hot)


def judge(instance: Instance, n_ranks: int, n_slots: int) -> np.ndarray:
    """Figures of every held-out batch in the order of `COLUMNS`."""
    sizes: dict[str, Any] = {"n_logical": EXPERTS, "ep_size": n_ranks}
    total = instance.history.sum(axis=0)
    packed = place_experts(total, **sizes, redundants_per_rank=0, method="eplb")
    table = packed.phy2log.reshape(n_ranks, -1)
    table = np.pad(table, [(0, 0), (0, n_slots)], constant_values=-1)
    empty = Placement.from_phy2log(table, **sizes)
    stacked = place_experts(instance.history[None], **sizes, redundants_per_rank=n_slots)
    static = jax.tree.map(lambda array: array[0], stacked)
    loads = instance.held_out.astype(np.int32)
    chosen, split = balanced(loads, empty)
    _, limited = balanced(loads, empty, fan_out=4)
    fixed = best_splits(loads, static)
    figures = np.zeros((len(loads), len(COLUMNS)))
    figures[:, 0] = [even(packed, loads[i : i + 1]) for i in range(len(loads))]
    mean = loads.sum(axis=1) / n_ranks
    for column, of in ((1, fixed), (2, split), (3, split), (6, limited)):
        figures[:, column] = np.asarray(of.max_load)[:, 0] / mean
    copies = np.asarray(chosen.phy2log).reshape(len(loads), n_ranks, -1)[:, :, -n_slots:]
    home = empty.log2phy[:, 0] // table.shape[1]
    for i, of_batch in enumerate(copies):
        sent = np.bincount(home[of_batch[of_batch >= 0]], minlength=n_ranks)
        figures[i, 4:6] = sent.sum(), sent.max()
    figures[:, 7] = microseconds(loads, empty)
    return figures


@functools.partial(jax.jit, static_argnames="fan_out")
def balanced(loads, placement, fan_out=None):
    def one(loads):
        chosen = place_copies(loads, placement, fan_out=fan_out)
        return chosen, solve(loads, placement=chosen)

    return jax.vmap(one)(loads)


@jax.jit
def best_splits(loads, placement):
    return jax.vmap(lambda loads: solve(loads, placement=placement))(loads)


@jax.jit
def many(loads, placement):
    return jax.vmap(lambda loads: place_copies(loads, placement))(loads)


def microseconds(loads: np.ndarray, placement: Placement) -> float:
    """Microseconds of one call on the batches: 64 calls in one program, best of five."""
    operands = jax.device_put((np.resize(loads, (64, EXPERTS)), placement))
    jax.block_until_ready(many(*operands))
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(many(*operands))
        best = min(best, time.perf_counter() - start)
    return best / 64 * 1e6


if __name__ == "__main__":
    main()
