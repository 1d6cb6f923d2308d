"""lax.ragged_all_to_all between processes against lax.all_to_all: values, gradients, bit for bit.

python ragged_checks.py COORDINATOR N_PROCESSES PROCESS SEED

One GPU per process. A newer NCCL than the installed one: LD_PRELOAD=…/libnccl.so.2.
"""

from __future__ import annotations

import sys
import time

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
SIZES = (256, 128)  # hidden and width, for the fast matrix products
N_CALLS, N_TOKENS, N_LAYERS = 4, 2048, 3


def model(mesh, case, transport):
    """Layers in a row, as a scheduler has collectives of several to choose from."""
    layer = moe_checks.layer_over(mesh, case, transport=transport, **moe_checks.ROOM)

    def run(tokens, gates, experts, ids, placement):
        traffic = []
        for i in range(N_LAYERS):
            out, seen = layer(tokens, gates, experts, jnp.roll(ids, i, axis=1), placement)
            tokens = tokens + out
            traffic.append(seen)
        return tokens, traffic

    return moe_checks.with_slopes(run)


def batch(rng, mesh, case):
    """A new one, as every process sees it."""
    n_tokens = N_TOKENS * case.ep_size
    routing = rng.choice([moe_checks.balanced, moe_checks.skewed, moe_checks.half_silent])
    floats, ids, placement = moe_checks.problem(rng, case, routing, n_tokens, jnp.bfloat16, SIZES)
    tokens, gates, experts = floats
    upstream = rng.normal(0, 1, tokens.shape).astype(np.float32)
    by_rank = (tokens, gates, moe_checks.in_slots(experts, placement)), upstream, ids
    by_rank = jax.tree.map(lambda array: everywhere(mesh, array), by_rank)
    placed = jax.tree.map(lambda array: everywhere(mesh, np.asarray(array), P()), placement)
    return routing.__name__, (*by_rank, placed)


def differences(got, expected) -> list[str]:
    """Leaves of which this process's parts are not the same bits."""
    found = []
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(paths, jax.tree.leaves(expected), strict=True):
        for part, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            here, there = (np.asarray(p.data).astype(np.float64) for p in (part, other))
            if not np.array_equal(here, there):
                name, most = jax.tree_util.keystr(path), np.abs(here - there).max()
                found.append(f"{name}: {np.mean(here != there):.1%} differ, by at most {most:g}")
    return found


def main() -> None:
    coordinator, n_processes, process, seed = sys.argv[1:]
    process = int(process)
    jax.distributed.initialize(coordinator, int(n_processes), process, local_device_ids=[process])
    mesh = Mesh(np.array(jax.devices()), "ep")
    nccl = ".".join(map(str, ragged.nccl_version() or ["none"]))
    print(f"{mesh.size} ranks, jax {jax.__version__}, NCCL {nccl}, --seed={seed}", flush=True)
    reason = ragged.Ragged().why_not_over(mesh.size)
    if reason is not None:
        print(f"not run: {reason}")
        return
    rng = np.random.default_rng(int(seed))
    wrong = 0
    for n_experts in EXPERTS:
        ring = topologies.ring(mesh.size)
        case = Case(ring, n_experts // mesh.size, combined=8)
        for options in (None, moe.COMPILER_OPTIONS):
            label = f"{n_experts} experts, {'COMPILER_OPTIONS' if options else 'no options'}"
            runs = {
                transport: jax.jit(model(mesh, case, transport), compiler_options=options)
                for transport in ("ragged", "padded")
            }
            for call in range(N_CALLS):
                routing, given = batch(rng, mesh, case)
                results, seconds = {}, {}
                for transport, run in runs.items():
                    start = time.perf_counter()
                    results[transport] = jax.block_until_ready(run(*given))
                    seconds[transport] = time.perf_counter() - start
                found = differences(results["ragged"], results["padded"])
                wrong += len(found)
                times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
                print(f"{label}, call {call}, {routing}: {found or 'same bits'} ({times})")
            sys.stdout.flush()
    assert not wrong, f"{wrong} arrays differ"
    print("all passed", flush=True)


if __name__ == "__main__":
    main()
