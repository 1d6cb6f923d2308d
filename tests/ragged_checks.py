"""lax.ragged_all_to_all between processes against lax.all_to_all: same bits, gradients included.

python ragged_checks.py COORDINATOR N_PROCESSES PROCESS SEED

One GPU per process. The library refuses this transport between processes, since with jaxlib 0.11.2
these checks hang, or find wrong gradients; they tell whether a newer XLA can.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import moe_checks
import numpy as np
from cases import Case
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import everywhere

from lplb_jax import moe, topologies
from lplb_jax.moe import ragged

EXPERTS = (96, 256)
HOW = tuple(itertools.product(EXPERTS, (False, True)))  # and whether with COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a check; the defaults allow the fast GEMMs."""

    hidden: int = 256
    width: int = 128
    tokens: int = 2048  # per rank
    layers: int = 3
    calls: int = 4
    dtype: Any = jnp.bfloat16


def model(mesh, case, transport, n_layers):
    """Several layers, so that the scheduler can reorder their collectives."""
    layer = moe_checks.layer_over(mesh, case, transport=transport, **moe_checks.ROOM)

    def run(tokens, gates, experts, ids, placement):
        traffic = []
        for i in range(n_layers):
            out, seen = layer(tokens, gates, experts, jnp.roll(ids, i, axis=1), placement)
            tokens = tokens + out
            traffic.append(seen)
        return tokens, traffic

    return moe_checks.with_slopes(run)


def batch(rng, mesh, case, sizes):
    """A new batch, the same on every process."""
    n_tokens = sizes.tokens * case.ep_size
    routing = rng.choice([moe_checks.balanced, moe_checks.skewed, moe_checks.half_silent])
    floats, ids, placement = moe_checks.problem(
        rng, case, routing, n_tokens, sizes.dtype, (sizes.hidden, sizes.width)
    )
    tokens, gates, experts = floats
    upstream = rng.normal(0, 1, tokens.shape).astype(np.float32)
    by_rank = (tokens, gates, moe_checks.in_slots(experts, placement)), upstream, ids
    by_rank = jax.tree.map(lambda array: everywhere(mesh, array), by_rank)
    placed = jax.tree.map(lambda array: everywhere(mesh, np.asarray(array), P()), placement)
    return routing.__name__, (*by_rank, placed)


def differences(got, expected) -> list[str]:
    """Leaves whose parts on this process differ in some bits."""
    found = []
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(paths, jax.tree.leaves(expected), strict=True):
        for part, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            here, there = (np.asarray(p.data).astype(np.float64) for p in (part, other))
            if not np.array_equal(here, there):
                name, most = jax.tree_util.keystr(path), np.abs(here - there).max()
                found.append(f"{name}: {np.mean(here != there):.1%} differ, by at most {most:g}")
    return found


def check(mesh, rng, sizes, how=HOW) -> None:
    """Prints what differs, and raises at the end if anything does."""
    cases = {n: Case(topologies.ring(mesh.size), n // mesh.size, combined=8) for n in EXPERTS}
    given = {n: batch(rng, mesh, case, sizes)[1] for n, case in cases.items()}
    start = time.perf_counter()

    def compiled(key):
        (n_experts, hides), transport = key
        run = jax.jit(
            model(mesh, cases[n_experts], transport, sizes.layers),
            compiler_options=moe.COMPILER_OPTIONS if hides else None,
        )
        return run.lower(*given[n_experts]).compile()

    keys = list(itertools.product(how, ("ragged", "padded")))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = dict(zip(keys, pool.map(compiled, keys), strict=True))
    print(f"compiled {len(runs)} programs: {time.perf_counter() - start:.1f} s", flush=True)
    wrong = 0
    for n_experts, hides in how:
        label = f"{n_experts} experts, {'COMPILER_OPTIONS' if hides else 'no options'}"
        for call in range(sizes.calls):
            routing, arguments = batch(rng, mesh, cases[n_experts], sizes)
            results, seconds = {}, {}
            for transport in ("ragged", "padded"):
                start = time.perf_counter()
                run = runs[(n_experts, hides), transport]
                results[transport] = jax.block_until_ready(run(*arguments))
                seconds[transport] = time.perf_counter() - start
            found = differences(results["ragged"], results["padded"])
            wrong += len(found)
            times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
            told = found or "same bits"
            print(f"{label}, call {call}, {routing}: {told} ({times})", flush=True)
    assert not wrong, f"{wrong} arrays differ"


def main() -> None:
    coordinator, n_processes, process, seed = sys.argv[1:]
    process = int(process)
    jax.distributed.initialize(coordinator, int(n_processes), process, local_device_ids=[process])
    mesh = Mesh(np.array(jax.devices()), "ep")
    print(f"{mesh.size} ranks, jax {jax.__version__}, --seed={seed}", flush=True)
    ragged.Ragged.why_not_here = lambda self: None
    check(mesh, np.random.default_rng(int(seed)), Sizes())
    print("all passed", flush=True)


if __name__ == "__main__":
    main()
