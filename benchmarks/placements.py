"""Compares placements by the busiest rank's load on batches that they were not made from.

    python benchmarks/placements.py [--ranks 8 16 32 64] [--slots 1 2 4] [--json out.json]

256 experts; largest over mean rank load, averaged over batches and instances (1 is optimal):

    none        no copies: experts packed onto ranks
    EPLB even   EPLB's placement; every slot of an expert serves an equal share
    EPLB exact  the same placement, every batch balanced exactly
    topology    along cube, hypercube, torus or ring over all ranks, balanced exactly
    auto        place_experts without r2o, balanced exactly

Loads: the packaged traces (two auxiliary losses, four layers), one half of the batches for the
other (`same step`, 4,096 tokens; `small batches`, 512 tokens), or the loads of step 300 for batches
of step 1200 (`stale`); Zipf's law with exponent 1.5, with single loads drifting by 10 %; one expert
with 10, 20 or 45 times the mean of the others; mixtures of six domains, where past and future
batches prefer different domains (`domain shift`). Runs on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import record

from lplb_jax import Placement, place_experts, topologies
from lplb_jax._portfolio import imbalances
from lplb_jax.data import AUX_LOSSES, load_traces

EXPERTS = 256
COLUMNS = ("none", "EPLB even", "EPLB exact", "topology", "auto")
ASSIGNMENTS = 1 << 18  # Per synthetic batch: 32,768 tokens, top-8.


class Instance(NamedTuple):
    """Loads `[batches, experts]` to make a placement from, and to evaluate it on."""

    name: str
    history: np.ndarray
    held_out: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()

    instances = [*traces(), *synthetic(np.random.default_rng(args.seed))]
    rows = []
    print(f"{'loads':16}{'ranks':>6}{'slots':>6}" + "".join(f"{name:>12}" for name in COLUMNS))
    for name in dict.fromkeys(instance.name for instance in instances):
        for n_ranks in args.ranks:
            for n_slots in args.slots:
                of_name = [instance for instance in instances if instance.name == name]
                means = np.mean([judge(one, n_ranks, n_slots) for one in of_name], axis=0)
                rows.append([name, n_ranks, n_slots, *means.round(4).tolist()])
                numbers = "".join(f"{mean:12.3f}" for mean in means)
                print(f"{name:16}{n_ranks:6}{n_slots:6}{numbers}", flush=True)
    report(rows)
    if args.json:
        keys = ("loads", "ranks", "slots", *COLUMNS)
        table = [dict(zip(keys, row, strict=True)) for row in rows]
        record.write(args.json, {"seed": args.seed, "rows": table})


def traces() -> Iterator[Instance]:
    for aux_loss in AUX_LOSSES:
        routing = load_traces(aux_loss)
        for indices, history in zip(routing.indices, routing.history, strict=True):
            large, small = counts(indices, 4096), counts(indices, 512)
            yield Instance("same step", large[:4], large[4:])
            yield Instance("stale", history[None], large)
            yield Instance("small batches", small[:32], small[32:])


def counts(indices: np.ndarray, n_tokens: int) -> np.ndarray:
    batches = indices.reshape(-1, n_tokens * indices.shape[-1])
    return np.stack([np.bincount(batch, minlength=EXPERTS) for batch in batches])


def synthetic(rng: np.random.Generator) -> Iterator[Instance]:
    def draw(loads: np.ndarray) -> np.ndarray:
        loads = np.broadcast_to(loads, (4, EXPERTS))
        return np.stack([rng.multinomial(ASSIGNMENTS, row / row.sum()) for row in loads])

    for _ in range(4):
        zipf = rng.permutation(np.arange(1, EXPERTS + 1) ** -1.5)
        yield Instance("Zipf 1.5", draw(zipf), draw(zipf * rng.lognormal(0, 0.1, EXPERTS)))
        for times in (10, 20, 45):
            hot = rng.lognormal(0, 0.5, EXPERTS)
            hot[rng.integers(EXPERTS)] = times * hot.mean()
            yield Instance(f"one expert {times}x", draw(hot), draw(hot))
        domains = rng.lognormal(0, 1.2, (6, EXPERTS))
        domains /= domains.sum(axis=1, keepdims=True)
        past = rng.dirichlet([2, 2, 2, 1, 1, 1], 4) @ domains
        future = rng.dirichlet([1, 1, 1, 2, 2, 2], 4) @ domains
        yield Instance("domain shift", draw(past), draw(future))


def judge(instance: Instance, n_ranks: int, n_slots: int) -> list[float]:
    """The imbalance of the held-out batches in the order of `COLUMNS`."""
    sizes: dict[str, Any] = {
        "n_logical": EXPERTS,
        "ep_size": n_ranks,
        "redundants_per_rank": n_slots,
    }
    total, history = instance.history.sum(axis=0), instance.history[None]
    fitting = topologies.named(n_ranks).values()
    r2o = max(
        (topology for topology in fitting if n_slots % topology.n_columns == 0),
        key=lambda topology: topology.n_columns,
    )
    tokens = instance.held_out.astype(np.int64)
    eplb = place_experts(total, **sizes, method="eplb")
    no_copies = place_experts(total, **{**sizes, "redundants_per_rank": 0}, method="eplb")
    exact = (eplb, place_experts(total, r2o, **sizes), place_experts(history, **sizes))
    return [
        even(no_copies, tokens),
        even(eplb, tokens),
        *(imbalances(placement.phy2log, n_ranks, tokens).mean() for placement in exact),
    ]


def even(placement: Placement, tokens: np.ndarray) -> float:
    share = (tokens / placement.logcnt)[:, placement.phy2log]
    ranks = share.reshape(len(tokens), placement.ep_size, -1).sum(axis=2)
    return float(np.mean(ranks.max(axis=1) / ranks.mean(axis=1)))


def report(rows: list[list]) -> None:
    """Prints how often the automatic placement is worse than the others, and by how much."""
    numbers = np.array([row[3:] for row in rows])
    behind_eplb = numbers[:, 4] - numbers[:, 2]
    behind_best = numbers[:, 4] - numbers[:, 2:4].min(axis=1)
    print(
        f"auto behind EPLB exact in {np.sum(behind_eplb > 0.001)} of {len(rows)} rows, by "
        f"{behind_eplb.max():.3f} at most; more than 0.01 behind the better of EPLB exact and "
        f"topology in {np.sum(behind_best > 0.01)}, by {behind_best.max():.3f} at most"
    )


if __name__ == "__main__":
    main()
