"""Checks of load sync on any number of GPUs, in one process or, run as a script, in several.

python sync_checks.py COORDINATOR N_PROCESSES PROCESS N_GPUS SEED SCENARIO
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

import any_cases
import jax
import jax.numpy as jnp
import moe_checks
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import assert_equal, everywhere, per_rank

from lplb_jax import (
    Placement,
    count_loads,
    init_comm,
    moe,
    place_experts,
    rebalance,
    sync_loads,
    topologies,
)
from lplb_jax.moe import ragged

N_TOKENS = [1, 5, 33, 1000, 8193, 32768, 200_000, 600_001]


def check_sync(mesh, comm, rng) -> None:
    """Integer-exact against lax.all_gather, for several sizes."""
    size = mesh.devices.size
    for n in (1, 31, 256, comm.max_experts):
        counts = everywhere(mesh, rng.integers(0, 2**31, size * n, dtype=np.int64).astype(np.int32))
        got = per_rank(lambda c: sync_loads(c, "ep", comm=comm), mesh)(counts)
        assert_equal(got, per_rank(lambda c: sync_loads(c, "ep"), mesh)(counts))


def placed(rng, r2o, size, n_logical):
    return place_experts(
        rng.random(n_logical),
        r2o,
        n_logical=n_logical,
        ep_size=size,
        redundants_per_rank=r2o.shape[1],
    )


def placed_anywhere(rng, size, n_logical):
    """A random table: experts with many slots, also on one rank, and empty slots."""
    sizes = any_cases.Sizes(size, -(-n_logical // size) + 3, n_logical)
    table = sizes.phy2log(rng).reshape(size, -1)
    return Placement.from_phy2log(table, ep_size=size, n_logical=n_logical)


def check_rebalance(mesh, comm, rng) -> None:
    """All results as without comm: for batches of one and of two launches, groups and dtypes; along
    a topology, anywhere, and over copies of the batch."""
    size = mesh.devices.size
    shapes = [topologies.ring(size), None, topologies.complete(size), "batch"]
    shapes += [topologies.ring(2)] if size > 2 else []
    shapes += [topologies.cube()] if size == 8 else []
    for i, n_tokens in enumerate(N_TOKENS):
        r2o = shapes[i % len(shapes)]
        n_logical = [32 * size, comm.max_experts // size * size][i % 2]
        copies = "placement"
        if isinstance(r2o, str):
            r2o, copies = None, r2o
        if r2o is None:
            placement = placed_anywhere(rng, size, n_logical)
        else:
            placement = placed(rng, r2o, size, n_logical)
        dtype = ["int32", "uint16"][i // 2 % 2]
        ids = rng.zipf(1.3, size * n_tokens) % (n_logical + 1)  # Some ids are invalid.
        ids = everywhere(mesh, ids.astype(dtype))

        def step(ids, comm=None, r2o=r2o, placement=placement, copies=copies):
            options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "positions": True}
            return rebalance(ids, None, r2o, comm=comm, copies=copies, **options)

        assert_equal(per_rank(lambda ids: step(ids, comm), mesh)(ids), per_rank(step, mesh)(ids))


def check_ipm(mesh, comm, rng) -> None:
    """The interior point takes its loads from comm, too."""
    size = mesh.devices.size
    r2o = topologies.ring(size)
    placement = placed(rng, r2o, size, 16 * size)
    ids = everywhere(mesh, rng.integers(0, 16 * size, size * 500).astype(np.int32))

    def step(ids, comm=None):
        options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "comm": comm}
        return rebalance(ids, None, r2o, solver="ipm", **options)

    assert_equal(per_rank(lambda ids: step(ids, comm), mesh)(ids), per_rank(step, mesh)(ids))


def check_programs(mesh, comm, rng) -> None:
    """Scan, replayed forward passes, other collectives between calls, two alternating programs."""
    size = mesh.devices.size
    r2o = topologies.ring(size)
    n_logical = 32 * size
    placement = placed(rng, r2o, size, n_logical)

    def layers(ids, comm=None):
        @jax.checkpoint
        def layer(x):
            chosen = (ids + x.sum().astype(jnp.int32)) % n_logical
            options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "comm": comm}
            physical, split = rebalance(chosen, None, r2o, **options)
            weight = 1 + physical.sum() % 7
            return lax.psum(x * weight, "ep") % 5, split.quota

        def loss(x):
            x, quotas = lax.scan(lambda x, _: layer(x), x, None, length=5)
            return x.sum(), quotas

        x = jnp.arange(4.0)
        (value, quotas), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return value, gradient, quotas

    def other(ids, comm=None):
        total = lax.psum(sync_loads(count_loads(ids, n_logical), "ep", comm=comm), "ep")
        return total, sync_loads(count_loads(ids % 3, n_logical), "ep", comm=comm)

    programs = [
        (per_rank(lambda ids, f=f: f(ids, comm), mesh), per_rank(f, mesh)) for f in (layers, other)
    ]
    for _ in range(4):
        ids = everywhere(mesh, rng.integers(0, n_logical, size * 300).astype(np.int32))
        for with_comm, without in programs:
            assert_equal(with_comm(ids), without(ids))


def check_layer(mesh, comm, rng) -> None:
    """A layer that exchanges counts by comm, with transfers hidden or not: value and gradients."""
    case = moe_checks.case_of(mesh.devices.size)
    layer = moe_checks.layer_over(mesh, case, comm=comm, **moe_checks.ROOM)
    with jax.default_matmul_precision("highest"):  # as the plain mathematics
        for options in (None, moe.COMPILER_OPTIONS):
            run = jax.jit(moe_checks.with_slopes(layer), compiler_options=options)
            for routing in (moe_checks.skewed, moe_checks.half_silent):
                given = moe_checks.problem(rng, case, routing, 40 * case.ep_size)
                moe_checks.assert_equals_plain_mathematics(run, mesh, *given, rng, 1e-4)
    reason = ragged.Ragged().why_not_here()
    if jax.process_count() > 1 and reason is not None:
        layer = moe_checks.layer_over(mesh, case, transport="ragged")
        floats, ids, placement = given
        floats = (*floats[:2], moe_checks.in_slots(floats[2], placement))
        words = f"^transport: .*got 'ragged'.*: {re.escape(reason)}(\n|$)"
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(layer, *floats, ids, placement)


def check_many(mesh, comm, rng, n_calls: int = 100_000) -> None:
    """Back-to-back calls with occasional random delays of a rank. All counts must be correct."""
    size, n = mesh.devices.size, 256

    def counts_of(i, rank):
        x = (i * size + rank).astype(jnp.uint32) * jnp.uint32(2654435761) + jnp.arange(
            n, dtype=jnp.uint32
        )
        x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
        return (x ^ (x >> 13)).astype(jnp.int32)

    def rank(first, late):
        def body(wrong, i):
            mine = lax.axis_index("ep")
            matrix = sync_loads(counts_of(i, mine), "ep", comm=comm)
            expected = jax.vmap(lambda rank: counts_of(i, rank))(jnp.arange(size))
            wrong += (matrix != expected).sum(dtype=jnp.int32)
            trips = jnp.where((i * 7 + mine * 3) % 16 == 0, late[0] % 5, 0)
            late_by = lax.fori_loop(0, trips, lambda _, x: jnp.sin(x) + 1, wrong.astype(float))
            return wrong + (late_by > 1e9).astype(jnp.int32), None

        calls = first[0] + jnp.arange(1000, dtype=jnp.int32)
        return lax.scan(body, jnp.int32(0), calls)[0]

    run = per_rank(rank, mesh, n_inputs=2)
    wrong = []
    for i in range(n_calls // 1000):
        first = everywhere(mesh, np.full(size, 1000 * i, np.int32))
        late = everywhere(mesh, rng.integers(0, 5, size).astype(np.int32))
        wrong.append(run(first, late))
    for array in wrong:
        for part in array.addressable_shards:
            assert np.asarray(part.data).sum() == 0


def check_sub_axis(devices, transport, rng) -> None:
    """Every row of a data × expert mesh is its own group, and either axis can be `axis_name`."""
    mesh = Mesh(np.asarray(devices).reshape(-1, len(devices) // 2), ("data", "ep"))
    for axis in ("data", "ep", ("data", "ep")):
        with init_comm(mesh, axis, max_experts=64, transport=transport) as comm:
            ids = rng.integers(0, 64, len(devices) * 200).astype(np.int32)
            ids = everywhere(mesh, ids, P(("data", "ep")))

            def step(ids, comm=None, axis=axis):
                return sync_loads(count_loads(ids, 64), axis, comm=comm)

            runs = [
                per_rank(lambda ids, c=c: step(ids, c), mesh, axis=("data", "ep"))
                for c in (comm, None)
            ]
            assert_equal(runs[0](ids), runs[1](ids))


CHECKS = [check_sync, check_rebalance, check_ipm, check_programs, check_layer, check_many]


def run_until_error(mesh, comm, on_call=lambda i: None) -> tuple[str, float]:
    """Calls until an error occurs; returns it and the duration of the last call in seconds."""
    step = per_rank(lambda c: sync_loads(c, "ep", comm=comm), mesh)
    counts = everywhere(mesh, np.ones(mesh.devices.size * 8, np.int32))
    for i in range(10_000):
        on_call(i)
        start = time.perf_counter()
        try:
            jax.block_until_ready(step(counts))
            jax.block_until_ready(step(counts))
        except Exception as error:
            return str(error), time.perf_counter() - start
    raise AssertionError("no error came")


def failed_status(mesh, comm) -> int:
    """The status of a rebalance whose peers do not come; runs it on all devices."""
    size = mesh.devices.size
    r2o = topologies.ring(size)
    placement = place_experts(None, r2o, n_logical=size, ep_size=size, redundants_per_rank=1)
    options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "comm": comm}
    run = per_rank(lambda ids: rebalance(ids, None, r2o, **options), mesh)
    physical, split = run(everywhere(mesh, np.zeros(size * 5, np.int32)))
    for part in physical.addressable_shards:
        assert (np.asarray(part.data) == -1).all()
    return int(np.asarray(split.status.addressable_shards[0].data).ravel()[0])


def main() -> None:
    coordinator, n_processes, process, n_gpus, seed, scenario = sys.argv[1:]
    process, n_processes, n_gpus = int(process), int(n_processes), int(n_gpus)
    shared = n_processes > n_gpus
    if shared:
        # NCCL refuses two ranks on one GPU of a host, so make each process look like its own host.
        os.environ.update(NCCL_HOSTID=f"rank {process}", NCCL_SOCKET_IFNAME="lo")
    mine = [process % n_gpus] if n_gpus else None  # without GPUs, each process has a CPU device
    jax.distributed.initialize(coordinator, n_processes, process, local_device_ids=mine)
    print(f"--seed={seed}", flush=True)
    rng = np.random.default_rng(int(seed))
    mesh = Mesh(np.array(jax.devices()), "ep")
    if scenario == "killed":
        comm = init_comm(mesh, "ep", max_experts=16, transport="nvshmem", timeout_s=3.0)

        def die(i):
            if process == 1 and i == 20:
                os._exit(0)

        error, seconds = run_until_error(mesh, comm, die)
        print(f"{seconds:.2f} s: {error}", flush=True)
        assert "DEADLINE_EXCEEDED" in error
        assert "counts of rank 1" in error
        assert seconds < 3 + 2
        assert "counts of rank 1" in (comm.failure() or "")
        comm.close()
        if process == 0:
            time.sleep(10)  # JAX aborts the others if this one, which coordinates them, ends first.
        os._exit(0)  # With a process missing, no orderly shutdown is possible.
    with init_comm(mesh, "ep", max_experts=512, transport=scenario) as comm:
        assert comm.transport == {"auto": "nvshmem"}.get(scenario, scenario), comm
        for check in CHECKS:
            # Processes that share a GPU take turns of milliseconds on it.
            options: dict[str, Any] = {"n_calls": 1000} if shared and check is check_many else {}
            start = time.perf_counter()
            check(mesh, comm, rng, **options)
            print(f"{check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
        transport = comm.transport
    if mesh.devices.size > 2:
        check_sub_axis(mesh.devices, transport, rng)
    print("all passed", flush=True)


if __name__ == "__main__":
    main()
