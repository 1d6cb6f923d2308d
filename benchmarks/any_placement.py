"""Times the kernels for any placement: solvers, copies of the batch, and rebalance as a whole.

Placements are EPLB's for 256 experts. They are made for some loads and timed on others: for the
demo's routing, these are random halves of a layer's sequences; for eight load families, loads
before and after a drift of one fifth. Every instance is captured in a CUDA graph of twenty
launches, which include the launch itself and reading the loads. Each result must be optimal, the
interior point's after its repair. The table has the mean, 99th percentile and largest time over the
instances, in µs, and the mean ratio of the largest to the mean load.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import graph
import jax
import jax.numpy as jnp
import numpy as np
import record
import solver as families
from rebalance_call import RebalanceCall

from lplb_jax import Placement, _bench, place_copies, place_experts
from lplb_jax.data import load_traces

N_LOGICAL = 256
SHAPES = [(8, 2), (16, 2), (32, 1), (32, 2), (64, 2), (64, 4), (128, 2), (256, 1)]
N_TOKENS = 32768
SOLVERS = ["exact", "ipm", "ipm, repaired"]
MOST_IPM_RANKS = 128


def eplb(loads: np.ndarray, ep_size: int, redundants_per_rank: int) -> Placement:
    """EPLB's placement for these loads, on one node."""
    return place_experts(
        loads,
        n_logical=N_LOGICAL,
        ep_size=ep_size,
        redundants_per_rank=redundants_per_rank,
        method="eplb",
    )


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


def solve_times(placement: Placement, loads: np.ndarray) -> tuple[dict[str, float], float]:
    """µs of one solve by each solver, and the largest load over the mean."""
    ep_size, n_physical = placement.ep_size, placement.n_physical
    tables = placement.phy2log, placement.log2phy
    operands = [jnp.asarray(a) for a in (loads[None], *tables, loads[:0])]
    operands.append(jnp.ones(ep_size, jnp.float32))  # the interior point's weights
    sizes = [ep_size, ep_size, 0, N_LOGICAL, n_physical, placement.log2phy.shape[1]]
    problem = sizes, [1, N_LOGICAL]
    read = [graph.pointer(a) for a in operands]
    times, largest = {}, set()
    for solver in SOLVERS if ep_size <= MOST_IPM_RANKS else SOLVERS[:1]:
        results = [jnp.full(n, -7, jnp.int32) for n in (n_physical, 1, 1, 1)]
        written = [graph.pointer(a) for a in results]
        options = (False, False, solver == "ipm, repaired", False)

        def launch(
            stream: int, exact: bool = solver == "exact", options=options, written=written
        ) -> None:
            if exact:
                _bench.launch_solve(*problem, 1, read[:4], written, stream)
            else:
                _bench.launch_ipm(*problem, options, 1, read, written, stream)

        times[solver] = graph.microseconds(launch, replays=5)
        quota, max_load, lower_bound, status = (np.asarray(a) for a in results)
        of_ranks = quota.reshape(ep_size, -1).sum(axis=1)
        if solver != "ipm":  # without repair, tokens are only rounded
            assert status == 0
            assert max_load == lower_bound == of_ranks.max()
            largest.add(int(max_load[0]))
        assert of_ranks.sum() == loads.sum()
    assert len(largest) == 1, largest
    return times, largest.pop() / max(loads.mean() * N_LOGICAL / ep_size, 1)


def copies_time(placement: Placement, loads: np.ndarray) -> tuple[float, float]:
    """µs of one `place_copies`, and the number of copies."""
    ep_size, n_physical = placement.ep_size, placement.n_physical
    width = min(ep_size, 1 + n_physical - N_LOGICAL)
    operands = [jnp.asarray(a) for a in (loads[None], placement.phy2log, placement.log2phy)]
    results = [jnp.zeros(n, jnp.int32) for n in (n_physical, N_LOGICAL * width, N_LOGICAL)]
    sizes = [ep_size, ep_size, 0, N_LOGICAL, n_physical, placement.log2phy.shape[1]]
    read, written = ([graph.pointer(a) for a in of] for of in (operands, results))

    def launch(stream: int) -> None:
        _bench.launch_place_copies(
            sizes, [1, N_LOGICAL], 1, read, 2**31 - 1, width, written, stream
        )

    median = graph.microseconds(launch, replays=5)
    got = [np.asarray(a) for a in results]
    wanted = jax.tree.map(np.asarray, place_copies(jnp.asarray(loads), placement))
    np.testing.assert_array_equal(got[0], wanted.phy2log)
    np.testing.assert_array_equal(got[1].reshape(N_LOGICAL, width), wanted.log2phy)
    np.testing.assert_array_equal(got[2], wanted.logcnt)
    return median, float((got[0] >= 0).sum() - N_LOGICAL)


def step_time(rng: np.random.Generator, ep_size: int, redundants: int, fan_out: int = 0) -> float:
    """µs of one rebalance of 32,768 indices of the traces, with positions."""
    history, batch = halves(rng)
    placement = eplb(counts_of(history), ep_size, redundants)
    indices = np.resize(batch, N_TOKENS).astype(np.int32)
    no_topology = np.zeros((ep_size, 0), np.int32)
    return RebalanceCall(no_topology, placement, indices, fan_out=fan_out).time(replays=5)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(times)),
        "p99": float(np.percentile(times, 99)),
        "max": float(np.max(times)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
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
    print(f"{'ranks + slots':<16}{'loads':<28}{'mean':>8}{'p99':>8}{'max':>8}{'load':>8}")
    kinds: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
        "traces": from_traces,
        "families": from_families,
    }

    def show(name: str, kind: str, times: list[float], load: str = "") -> None:
        figures[f"{name}/{kind}"] = row = summary(times)
        cells = "".join(f"{value:8.2f}" for value in row.values())
        print(f"{name:<16}{kind:<28}{cells}{load:>8}", flush=True)

    for ep_size, redundants in SHAPES:
        for kind, make in kinds.items():
            times: dict[str, list[float]] = {}
            loads = []
            for i in range(arguments.instances):
                history, batch = make(rng, i)
                each, load = solve_times(eplb(history, ep_size, redundants), batch)
                for solver, time in each.items():
                    times.setdefault(solver, []).append(time)
                loads.append(load)
            for solver, of_solver in times.items():
                label = kind if solver == "exact" else f"{kind}, {solver}"
                show(f"{ep_size} + {redundants}", label, of_solver, f"{np.mean(loads):.3f}")
    print("\nplace_copies; load: the number of copies")
    for ep_size, redundants in SHAPES:
        for kind, make in kinds.items():
            instances = [make(rng, i) for i in range(arguments.instances)]
            pairs = [
                copies_time(eplb(history, ep_size, redundants), batch)
                for history, batch in instances
            ]
            of_kind, copies = zip(*pairs, strict=True)
            label = f"{kind}, copies"
            show(f"{ep_size} + {redundants}", label, list(of_kind), f"{np.mean(copies):.1f}")
    print(f"\nrebalance of {N_TOKENS:,} indices, positions included")
    for ep_size, redundants in SHAPES:
        for name, fan_out in {"step": 0, "step, copies of the batch": N_LOGICAL}.items():
            shape = ep_size, redundants, fan_out
            steps = [step_time(rng, *shape) for _ in range(arguments.instances)]
            show(f"{ep_size} + {redundants}", name, steps)
    if arguments.json:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    main()
