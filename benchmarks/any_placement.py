"""Times the kernels for any placement: the exact solver, and rebalance as a whole.

Placements are EPLB's for 256 experts: every redundant slot goes to the expert with the largest load
per copy, the copies are packed by falling load. They are made for some loads and timed on others:
the demo's routing, where random halves of a layer's sequences are the two, and eight load families,
which drift by a fifth. Every instance is captured in a CUDA graph of twenty launches, launch and
reading the loads included; each result must be optimal. The table has mean, 99th percentile and
largest time over the instances, in µs, and the mean largest load over the mean.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import graph
import jax
import jax.numpy as jnp
import numpy as np
import solver as families
from rebalance_call import RebalanceCall

from lplb_jax import Placement, _bench
from lplb_jax.data import load_traces

N_LOGICAL = 256
SHAPES = [(8, 2), (16, 2), (32, 1), (32, 2), (64, 2), (64, 4), (128, 2), (256, 1)]
N_TOKENS = 32768


def eplb(loads: np.ndarray, ep_size: int, redundants_per_rank: int) -> np.ndarray:
    """EPLB's table for one node, `[ep_size, slots_per_rank]`."""
    n_slots = len(loads) + ep_size * redundants_per_rank
    copies = np.ones(len(loads), int)
    for _ in range(n_slots - len(loads)):
        copies[np.argmax(loads / copies)] += 1
    experts = np.repeat(np.arange(len(loads)), copies)
    share = (loads / copies)[experts]
    table: list[list[int]] = [[] for _ in range(ep_size)]
    weight = np.zeros(ep_size)
    for i in np.argsort(-share, kind="stable"):
        open_ranks = [len(row) < n_slots // ep_size for row in table]
        rank = int(np.argmin(np.where(open_ranks, weight, np.inf)))
        table[rank].append(int(experts[i]))
        weight[rank] += share[i]
    return np.array(table, np.int32)


def halves(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a random half of a layer's 32 sequences, and of the other half."""
    trace = np.asarray(load_traces(str(rng.choice(["1e-2", "1e-3"]))).indices)
    sequences = trace[rng.integers(len(trace))].reshape(32, -1)
    order = rng.permutation(32)
    return sequences[order[:16]].ravel(), sequences[order[16:]].ravel()


def counts_of(ids: np.ndarray) -> np.ndarray:
    return np.bincount(ids, minlength=N_LOGICAL).astype(np.int32)


def from_traces(rng: np.random.Generator, instance: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads to place the experts by, and loads to balance."""
    history, batch = halves(rng)
    return counts_of(history), counts_of(batch)


def from_families(rng: np.random.Generator, instance: int) -> tuple[np.ndarray, np.ndarray]:
    family = families.FAMILIES[instance % len(families.FAMILIES)]
    history = np.minimum(family(rng, 8, N_LOGICAL // 8).ravel(), 2**31 // N_LOGICAL)
    drift = rng.lognormal(0, 0.2, N_LOGICAL)
    return history, np.minimum(history * drift, 2**31 // N_LOGICAL).astype(np.int32)


def solve_time(table: np.ndarray, loads: np.ndarray) -> tuple[float, float]:
    """µs of one solve, and its largest load over the mean."""
    ep_size = len(table)
    placement = Placement.from_phy2log(table, ep_size=ep_size, n_logical=N_LOGICAL)
    log2phy = np.asarray(placement.log2phy)
    operands = [jnp.asarray(a) for a in (loads[None], table.ravel(), log2phy, loads[:0])]
    results = [jnp.full(n, -7, jnp.int32) for n in (table.size, 1, 1, 1)]
    sizes = [ep_size, ep_size, 0, N_LOGICAL, table.size, log2phy.shape[1]]
    pointers = [[graph.pointer(a) for a in of] for of in (operands, results)]

    def launch(stream: int) -> None:
        _bench.launch_solve(sizes, [1, N_LOGICAL], 1, *pointers, stream)

    median = graph.microseconds(launch, replays=5)
    quota, max_load, lower_bound, status = (np.asarray(a) for a in results)
    assert status == 0
    assert max_load == lower_bound
    assert quota.reshape(ep_size, -1).sum(axis=1).max() == max_load
    return median, float(max_load[0] / max(loads.mean() * N_LOGICAL / ep_size, 1))


def step_time(rng: np.random.Generator, ep_size: int, redundants: int) -> float:
    """µs of one rebalance of 32,768 indices of the traces, with positions."""
    history, batch = halves(rng)
    table = eplb(counts_of(history).astype(float), ep_size, redundants)
    placement = Placement.from_phy2log(table, ep_size=ep_size, n_logical=N_LOGICAL)
    indices = np.resize(batch, N_TOKENS).astype(np.int32)
    call = RebalanceCall(np.zeros((ep_size, 0), np.int32), placement, indices)
    problem, *rest = call.arguments
    median = graph.microseconds(
        lambda stream: _bench.launch_rebalance(problem, 1, *rest, stream), replays=5
    )
    got = jax.tree.map(np.asarray, call.results)
    assert got.status == 0
    assert got.max_load == got.lower_bound
    of_slots = np.bincount(got.physical_indices, minlength=placement.n_physical)
    assert np.array_equal(of_slots, got.quota)
    assert np.array_equal(got.counts, got.quota)
    return median


def summary(times: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(times)),
        "p99": float(np.percentile(times, 99)),
        "max": float(np.max(times)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=100, help="of every kind and shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    device = jax.devices()[0]
    figures: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "instances": arguments.instances,
    }
    print(f"{device.device_kind}, jax {jax.__version__}; {N_LOGICAL} experts, EPLB's placements")
    print(f"{'ranks + slots':<16}{'loads':<12}{'mean':>8}{'p99':>8}{'max':>8}{'load':>8}")
    kinds: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
        "traces": from_traces,
        "families": from_families,
    }

    def show(name: str, kind: str, times: list[float], load: str = "") -> None:
        figures[f"{name}/{kind}"] = row = summary(times)
        cells = "".join(f"{value:8.2f}" for value in row.values())
        print(f"{name:<16}{kind:<12}{cells}{load:>8}", flush=True)

    for ep_size, redundants in SHAPES:
        for kind, make in kinds.items():
            times, loads = [], []
            for i in range(arguments.instances):
                history, batch = make(rng, i)
                table = eplb(history.astype(float), ep_size, redundants)
                time, load = solve_time(table, batch)
                times.append(time)
                loads.append(load)
            show(f"{ep_size} + {redundants}", kind, times, f"{np.mean(loads):.3f}")
    print(f"\nrebalance of {N_TOKENS:,} indices, positions included")
    for ep_size, redundants in SHAPES:
        times = [step_time(rng, ep_size, redundants) for _ in range(arguments.instances // 5)]
        show(f"{ep_size} + {redundants}", "step", times)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
