"""Times the solvers' kernels alone, over many instances, and checks every result.

    python benchmarks/solver.py [--instances 200] [--topologies cube ...] [--json out.json]

Median time per launch in a CUDA graph (see graph.py): mean, p50, p95 and max over instances of
eight load families, including the launch and reading the int32 loads. max_load must equal the lower
bound for the exact solver and for the repaired interior point; without repair, its real plan must
be within 1e-4 of its proven bound. Otherwise the script exits with 1. The interior point's steps
are counted by the plain-JAX specification. If the library was built with cuSolverDx, the same
kernel with its factorization is timed as well, and unconverged instances are counted.

Next come 58 layers, and 64 groups, in one launch: its time as a multiple of the mean time of these
layers or groups alone, and of the slowest, which it has to wait for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from typing import Any

import graph
import jax
import jax.numpy as jnp
import numpy as np
import record

import lplb_jax
from lplb_jax import _bench, _cuda, place_experts, topologies
from lplb_jax.reference.ipm import interior_point, inverse
from lplb_jax.topologies import Topology

# name: topology, experts per rank, redundant slots per rank
TOPOLOGIES = {
    "ring 8x1": (topologies.ring(8), 32, 1),
    "cube": (topologies.cube(), 32, 2),
    "hypercube": (topologies.hypercube(), 16, 2),
    "torus 8x4": (topologies.torus(8, 4), 8, 2),
    "torus 8x8": (topologies.torus(8, 8), 4, 2),
    "torus 16x8": (topologies.torus(16, 8), 2, 2),
}


def mild(rng, group_size, n_local):
    return rng.normal(200, 40, group_size * n_local).clip(0)


def skewed(rng, group_size, n_local):
    return rng.lognormal(4, 1.5, group_size * n_local)


def zipf(rng, group_size, n_local):
    weight = 1 / rng.permutation(np.arange(1, group_size * n_local + 1)) ** 1.1
    return rng.multinomial(50_000, weight / weight.sum())


def one_hot(rng, group_size, n_local):
    loads = np.zeros(group_size * n_local)
    loads[rng.integers(len(loads))] = rng.integers(1, 100_000)
    return loads


def zeros_mixed(rng, group_size, n_local):
    n = group_size * n_local
    return rng.integers(0, 1000, n) * (rng.random(n) < rng.random())


def tiny(rng, group_size, n_local):
    n = group_size * n_local
    return rng.multinomial(rng.integers(1, group_size), np.full(n, 1 / n))


def huge(rng, group_size, n_local):
    most = (2**31 - 1) // (n_local + 4)
    return most - rng.integers(0, most // 5, group_size * n_local)


def half_empty(rng, group_size, n_local):
    loads = rng.integers(0, 1000, (group_size, n_local))
    loads[1::2] = 0
    loads[2 * rng.integers((group_size + 1) // 2)] *= 20
    return loads.reshape(-1)


FAMILIES = [mild, skewed, zipf, one_hot, zeros_mixed, tiny, huge, half_empty]


@dataclasses.dataclass
class Bench:
    """One topology's placement and device buffers, for batches of up to `most` elements."""

    r2o: Topology | np.ndarray
    n_local: int
    n_redundant: int
    most: int

    def __post_init__(self):
        group_size = len(self.r2o)
        self.placement = place_experts(
            None,
            self.r2o,
            n_logical=group_size * self.n_local,
            ep_size=group_size,
            redundants_per_rank=self.n_redundant,
        )
        place = self.placement
        self.sizes = (
            group_size,
            group_size,
            self.r2o.shape[1],
            place.n_logical,
            place.n_physical,
            np.asarray(place.log2phy).shape[1],
        )

        def repeated(array, dtype: Any = np.int32):
            array = np.asarray(array, dtype)
            return jnp.asarray(np.broadcast_to(array, (self.most, *array.shape)))

        # Kept alive here, since the launchers get addresses.
        self.loads = None
        self.inputs = [repeated(a) for a in (place.phy2log, place.log2phy, self.r2o)]
        self.weights = repeated(np.ones(group_size), np.float32)
        self.outputs = [jnp.zeros((self.most, place.n_physical), jnp.int32)]
        self.outputs += [jnp.zeros(self.most, jnp.int32) for _ in range(3)]

    def launcher(self, name: str, loads: np.ndarray):
        """A launch of solver `name` over a batch of loads."""
        self.loads = jnp.asarray(loads)
        batch, sources = len(loads), (1, self.sizes[3])
        solve_in = [graph.pointer(a) for a in (self.loads, *self.inputs)]
        out = [graph.pointer(a) for a in self.outputs]
        if name == "exact":
            return lambda stream: _bench.launch_solve(
                self.sizes, sources, batch, solve_in, out, stream
            )
        options = (False, False, name == "ipm, repaired", name == "ipm, cuSolverDx")
        ipm_in = [*solve_in, graph.pointer(self.weights)]
        return lambda stream: _bench.launch_ipm(
            self.sizes, sources, options, batch, ipm_in, out, stream
        )

    def check(self, loads: np.ndarray) -> dict[str, Any]:
        """Solves all instances through JAX; returns the worst gaps, and any lack of optimality."""

        def run(dtype, **options):
            solve = jax.jit(
                jax.vmap(
                    lambda row: lplb_jax.solve(row, self.r2o, placement=self.placement, **options)
                )
            )
            return jax.tree.map(np.asarray, solve(loads.astype(dtype)))

        exact = run(np.int32, solver="exact")
        repaired = run(np.int32, solver="ipm")
        real = run(np.float32, solver="ipm")
        gap = (real.max_load - real.lower_bound) / np.maximum(real.max_load, 1e-30)
        steps = self.steps(loads)
        result = {
            "exact not optimal": int((exact.max_load != exact.lower_bound).sum()),
            "repaired not optimal": int((repaired.max_load != exact.max_load).sum()),
            "ipm not converged": int((real.status != 0).sum()),
            "ipm largest gap": float(gap.max()),
            "ipm steps": [float(steps.mean()), int(steps.max())],  # mean, max
        }
        if _cuda.has_cusolverdx():
            other = run(np.float32, solver="ipm", factor="cusolverdx")
            result["cuSolverDx not converged"] = int((other.status != 0).sum())
        return result

    def steps(self, loads: np.ndarray) -> np.ndarray:
        """The interior point's steps for all instances, counted by the specification."""
        group_size, n_columns = self.r2o.shape
        own = loads.reshape(len(loads), group_size, self.n_local).astype(np.float32)
        cap = own[:, :, : self.n_redundant].reshape(*own.shape[:2], -1, n_columns).sum(axis=2)
        r2o = jnp.asarray(self.r2o)
        dst = inverse(r2o)
        weights = jnp.ones(group_size)
        one = functools.partial(interior_point, w=weights, r2o=r2o, dst=dst)
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(jax.jit(jax.vmap(one))(own.sum(axis=2), cap).steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--instances", type=int, default=200, help="per topology")
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    properties = graph.check(graph.runtime.cudaGetDeviceProperties(0))
    machine = f"{properties.name.decode().rstrip(chr(0))}, jax {jax.__version__}"
    empty = graph.microseconds(_bench.launch_empty)
    results: dict[str, Any] = {"machine": machine, "empty kernel": round(empty, 3)}
    print(f"{machine}; an empty kernel: {empty:.2f} µs")
    names = ["exact", "ipm", "ipm, repaired"]
    if _cuda.has_cusolverdx():
        names.append("ipm, cuSolverDx")
    wrong = 0
    for topology in arguments.topologies:
        r2o, n_local, n_redundant = TOPOLOGIES[topology]
        rng = np.random.default_rng(arguments.seed)
        each = -(-arguments.instances // len(FAMILIES))
        loads = np.stack(
            [f(rng, len(r2o), n_local).astype(np.int32) for f in FAMILIES for _ in range(each)]
        )
        bench = Bench(r2o, n_local, n_redundant, most=64)
        result = results[topology] = bench.check(loads)
        wrong += result["exact not optimal"] + result["repaired not optimal"]
        wrong += result["ipm not converged"]
        print(f"\n{topology}: {len(loads)} instances, {result}")
        print("| solver | mean µs | p50 | p95 | max |", end="")
        print(" 58 layers, × mean, × slowest, × if equal |", end="")
        print(" 64 groups, likewise |\n|---|---|---|---|---|---|---|")
        launches = 10 if len(r2o) <= 64 else 2
        for name in names:
            times = np.array(
                [
                    graph.microseconds(
                        bench.launcher(name, row[None]), launches=launches, replays=5
                    )
                    for row in loads
                ]
            )
            row = {
                "mean": times.mean(),
                "p50": np.median(times),
                "p95": np.quantile(times, 0.95),
                "max": times.max(),
            }
            cells = [f"{value:.2f}" for value in row.values()]
            usual = np.argsort(times)[len(times) // 2]
            for n, what in ((58, "58 layers"), (64, "64 groups")):
                chosen = rng.permutation(len(loads))[np.arange(n) % len(loads)]
                taken, equal = (
                    graph.microseconds(bench.launcher(name, loads[some]), launches=launches)
                    for some in (chosen, np.full(n, usual))
                )
                ratios = [
                    taken / times[chosen].mean(), taken / times[chosen].max(), equal / times[usual]
                ]  # fmt: skip
                row[what], row[f"{what}, × mean, × slowest, × if equal"] = taken, ratios
                cells.append(", ".join(f"{value:.2f}" for value in (taken, *ratios)))
            result[name] = {key: np.round(value, 3).tolist() for key, value in row.items()}
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if arguments.json:
            record.write(arguments.json, results)
    if wrong:
        sys.exit(f"{wrong} results are not as they should be")


if __name__ == "__main__":
    main()
