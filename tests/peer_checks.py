"""Checks of transport "peer" on any devices, in one process or, run as a script, in several.

python peer_checks.py COORDINATOR N_PROCESSES PROCESS SEED SCENARIO TRANSPORT
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import moe_checks
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import assert_equal, everywhere, per_rank

from lplb_jax import init_comm, moe, topologies
from lplb_jax._axes import varying_over
from lplb_jax.assignment import Assignment
from lplb_jax.moe.fetch import Fetch, filled
from lplb_jax.moe.flight import Flight, arrive, depart
from lplb_jax.moe.replicas import with_room

HIDDEN, TOP_K = moe_checks.HIDDEN, moe_checks.TOP_K
WINDOWS = {"max_tokens": 256, "hidden_bytes": 2048, "top_k": 8, "capacity_factor": 8.0}

WITH_COPIES = {**WINDOWS, "copy_bytes": 1 << 16}


def check_layer(
    mesh, comm, rng, *, balance="lplb", routings=(moe_checks.skewed,), options=None, check_vma=True
):
    """Value and gradients equal those on one device."""
    case = moe_checks.case_of(mesh.size)
    how: dict[str, Any] = {
        "comm": comm,
        "transport": "peer",
        "balance": balance,
        "check_vma": check_vma,
    }
    layer = moe_checks.layer_over(mesh, case, **how, **moe_checks.ROOM)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(moe_checks.with_slopes(layer), compiler_options=options)
        for routing in routings:
            given = moe_checks.problem(rng, case, routing, 16 * mesh.size)
            moe_checks.assert_equals_plain_mathematics(run, mesh, *given, rng, 1e-4)


def check_anywhere(mesh, comm, rng, copies="placement"):
    """The same for a placement without topology; between processes, copies take the windows."""
    case = moe_checks.AnyCase(mesh.size, 5, 3 * mesh.size)
    how: dict[str, Any] = {"comm": comm, "transport": "peer", "copies": copies}
    layer = moe_checks.layer_over(mesh, case, **how, **moe_checks.ROOM)
    with jax.default_matmul_precision("highest"):
        given = moe_checks.problem(rng, case, moe_checks.skewed, 16 * mesh.size)
        run = moe_checks.with_slopes(layer)
        moe_checks.assert_equals_plain_mathematics(run, mesh, *given, rng, 1e-4)


def check_sub_axis(mesh, comm, rng, copies):
    """data × ep: every slice of "data" has a batch and windows of its own, and the same experts."""
    both, size = P(("data", "ep")), mesh.shape["ep"]
    case = moe_checks.AnyCase(size, 5, 3 * size)
    floats, ids, placement = moe_checks.problem(rng, case, moe_checks.skewed, 16 * mesh.size)
    tokens, gates, experts = floats

    def rank(tokens, gates, experts, ids):
        result = moe.moe_layer(
            tokens, ids, gates, experts, placement=placement, axis_name="ep", copies=copies,
            transport="peer", comm=comm, **moe_checks.ROOM,
        )  # fmt: skip
        return result.out, None

    run = jax.shard_map(
        rank, mesh=mesh, in_specs=(both, both, P("ep"), both), out_specs=(both, P())
    )
    with jax.default_matmul_precision("highest"):
        given = tokens, gates, moe_checks.in_slots(experts, placement)
        out, (*slopes, of_experts), _ = moe_checks.with_slopes(run)(given, tokens, ids)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain, (*want, of_all), _ = moe_checks.PLAIN(floats, tokens, ids)
    want = [plain, *want, *moe_checks.in_slots(of_all, placement)]
    for name, ours, theirs in zip(moe_checks.NAMES, [out, *slopes, *of_experts], want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=name)


def check_flights(mesh, comm, rng, n_layers=3):
    """Copies that fly with the tokens of several layers in a scan and their gradients, bit for bit
    those of `lax.ppermute`; float32, bfloat16 and integers together."""
    n_ranks, n_local, n_copies = mesh.size, 4, 2
    r2o = topologies.ring(n_ranks)
    shapes = {"float32": (n_local, 3, 8), "bfloat16": (n_local, 16), "int32": (n_local, 4)}
    given = {name: rng.integers(-9, 9, (n_ranks * shape[0], *shape[1:])).astype(name)
             for name, shape in shapes.items()}  # fmt: skip
    upstream = {name: rng.integers(-9, 9, (n_ranks * (n_local + n_copies), *shape[1:]))
                for name, shape in shapes.items()}  # fmt: skip

    def rank(flies, weights, upstream):
        fetch = Flight(r2o, "ep", n_copies, comm) if flies else Fetch(r2o, "ep", n_copies)

        def filled_by(weights):
            rows = jax.tree.map(lambda array: with_room(array, n_copies), weights)
            tokens = varying_over(jnp.ones((4, 8)), "ep")
            if flies:
                tokens, rows, number = depart(fetch, tokens, rows)
                return arrive(fetch, tokens, rows, number)[1]
            return jax.tree.map(lambda array: filled(fetch, array), rows)

        def layer(carry, _):
            slots, pull = jax.vjp(filled_by, {**carry, "int32": weights["int32"]})
            cts = {name: upstream[name].astype(slots[name].dtype) for name in carry}
            (ct,) = pull({**cts, "int32": np.zeros(slots["int32"].shape, jax.dtypes.float0)})
            return {name: carry[name] + ct[name] for name in carry}, slots

        floats = {name: weights[name] for name in ("float32", "bfloat16")}
        return lax.scan(layer, floats, jnp.arange(n_layers))

    results = []
    for flies in (True, False):
        run = per_rank(functools.partial(rank, flies), mesh, n_inputs=2)
        results.append(run(*jax.tree.map(lambda x: everywhere(mesh, x), (given, upstream))))
    assert_equal(*results)


def assigned(ids, n_ranks):
    """Assigns the given slots, one per rank, −1 for none, in the order of ranks and tokens."""
    flat = ids.reshape(-1)
    chosen = flat[:, None] == jnp.arange(n_ranks, dtype=jnp.int32)[None]
    counts = chosen.sum(axis=0, dtype=jnp.int32)
    before = jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - chosen.astype(jnp.int32)
    # A position counts a source's own rows of a slot.
    position = jnp.take_along_axis(before, jnp.maximum(flat, 0)[:, None], axis=1)
    return Assignment(ids, position.reshape(ids.shape), counts)


def both_ways(mesh, capacity, **options):
    """dispatch, combine and their transposes: of tokens, gates, slots, and the sums' gradient."""

    def rank(tokens, gates, ids, upstream):
        slots = assigned(ids, mesh.size)

        def send(tokens, gates):
            rows, row_gates, plan = moe.dispatch(
                tokens, gates, slots, axis_name="ep", capacity=capacity, **options
            )
            used = jnp.arange(capacity) < plan.group_sizes.sum()
            return jnp.where(used[:, None], rows, 0), jnp.where(used, row_gates, 0), plan

        rows, row_gates, plan = send(tokens, gates)
        backwards = jax.vjp(lambda *given: send(*given)[:2], tokens, gates)[1]
        out, home = jax.vjp(lambda rows: moe.combine(rows, plan), rows)
        scaled = (rows * 2, row_gates * 3)
        return rows, row_gates, out, backwards(scaled), home(upstream)[0], plan.overflow

    return per_rank(rank, mesh, n_inputs=4)


def check_parts(mesh, comm, rng, n_rounds=4, dtypes=("float32",)):
    """dispatch, combine and their transposes against "padded": the same rows, and sums to
    rounding."""
    n_ranks = mesh.size
    transports = {"transport": "peer", "comm": comm}, {"transport": "padded"}
    for dtype in dtypes:
        for _ in range(n_rounds):
            n_tokens, top_k = int(rng.integers(1, 17)), int(rng.integers(1, TOP_K + 1))
            capacity = int(rng.integers(1, 2 * n_tokens * top_k + 2))
            hidden = 8 * int(rng.integers(1, 3))
            ids = rng.integers(-1, n_ranks, (n_ranks * n_tokens, top_k)).astype(np.int32)
            shape = (n_ranks * n_tokens, hidden)
            given = [rng.integers(-8, 8, shape), rng.random(ids.shape), ids]
            given.append(rng.integers(-8, 8, shape))
            given = [
                everywhere(mesh, array.astype(t))
                for array, t in zip(given, (dtype, "float32", "int32", dtype), strict=True)
            ]
            peer, padded = (both_ways(mesh, capacity, **how)(*given) for how in transports)
            for got, expected in zip(jax.tree.leaves(peer), jax.tree.leaves(padded), strict=True):
                for a, b in zip(got.addressable_shards, expected.addressable_shards, strict=True):
                    a, b = (np.asarray(part.data).astype(np.float64) for part in (a, b))
                    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def check_bits(mesh, comm, rng, n_batches=3):
    """Rows, gates, sums and gradients have the bits of the exchange over mapped windows."""
    n_ranks = mesh.size
    with init_comm(mesh, max_experts=64, transport="nvshmem", **WINDOWS) as mapped:
        for dtype in ("bfloat16", "float16", "float32"):
            n_tokens, top_k = int(rng.integers(1, 257)), int(rng.integers(1, 9))
            capacity = int(rng.integers(1, 2 * n_tokens * top_k + 2))
            shape = n_ranks * n_tokens, 8 * int(rng.integers(1, 65))
            both = [both_ways(mesh, capacity, transport="peer", comm=c) for c in (comm, mapped)]
            for _ in range(n_batches):
                ids = rng.integers(-1, n_ranks, (shape[0], top_k)).astype(np.int32)
                tokens, upstream = (rng.normal(size=shape).astype(dtype) for _ in "ab")
                given = tokens, rng.random(ids.shape).astype(np.float32), ids, upstream
                given = [everywhere(mesh, array) for array in given]
                assert_equal(*(run(*given) for run in both))


def check_many(mesh, comm, rng, n_batches=100):
    """Batches of all kinds in one program, with random delays of ranks: every row, gate and sum.

    All ranks derive a batch from its key, so each knows what it must receive. One rank gets
    everything, or some ranks send nothing; there is room for half of all rows.
    """
    n_ranks, hidden = mesh.size, 8 * int(rng.integers(1, 65))
    n_tokens, top_k = int(rng.integers(1, 33)), int(rng.integers(1, TOP_K + 1))
    shape = n_ranks, n_tokens, top_k
    capacity = max(1, n_ranks * n_tokens * top_k // 2)
    options = {"axis_name": "ep", "capacity": capacity, "transport": "peer", "comm": comm}

    def choices(key):
        kind, some, one = jax.random.split(key, 3)
        any_of = jax.random.randint(some, shape, -1, n_ranks, jnp.int32)
        silent = (jnp.arange(n_ranks) % 2 == 0)[:, None, None]
        return lax.switch(
            jax.random.randint(kind, (), 0, 4),
            [
                lambda: any_of,
                lambda: jnp.full(shape, jax.random.randint(one, (), 0, n_ranks, jnp.int32)),
                lambda: jnp.where(silent, -1, any_of),
                lambda: jnp.full(shape, -1, jnp.int32),
            ],
        )

    def rank(keys):
        me = lax.axis_index("ep")

        def one(wrong, key):
            of_ids, of_tokens, of_gates, of_delay = jax.random.split(key, 4)
            ids = choices(of_ids)
            tokens = jax.random.randint(of_tokens, (n_ranks, n_tokens, hidden), -8, 9)
            tokens, gates = tokens.astype(jnp.bfloat16), jax.random.uniform(of_gates, shape)
            rounds = jax.random.randint(jax.random.fold_in(of_delay, me), (), 0, 300)
            late = lax.fori_loop(0, rounds, lambda i, x: jnp.sin(x + i), me.astype(jnp.float32))
            given, _ = lax.optimization_barrier((tokens[me], late))
            slots = assigned(ids[me], n_ranks)
            rows, row_gates, plan = moe.dispatch(given, gates[me], slots, **options)
            sums = moe.combine(rows, plan)

            goes = ids.reshape(-1, 1) == jnp.arange(n_ranks)
            place = jnp.cumsum(goes, axis=0) - 1
            fits = goes & (place < capacity)
            at = jnp.where(fits[:, me], place[:, me], capacity)
            want = (
                jnp.zeros((capacity, hidden), tokens.dtype)
                .at[at]
                .set(jnp.repeat(tokens.reshape(-1, hidden), top_k, axis=0), mode="drop")
            )
            want_gates = jnp.zeros(capacity).at[at].set(gates.reshape(-1), mode="drop")
            used = jnp.arange(capacity) < fits[:, me].sum()
            times = fits.any(axis=1).reshape(shape)[me].sum(axis=1)
            wrong += (used & ((rows != want).any(axis=1) | (row_gates != want_gates))).sum()
            wrong += (sums != tokens[me] * times[:, None].astype(tokens.dtype)).any(axis=1).sum()
            return wrong, None

        return lax.scan(one, varying_over(jnp.int32(0), "ep"), keys)[0][None]

    run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P(), out_specs=P("ep")))
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), n_batches)
    wrong = run(everywhere(mesh, jax.random.key_data(keys), P()))
    for part in wrong.addressable_shards:
        np.testing.assert_array_equal(part.data, 0)


def check_ten_thousand(mesh, comm, rng):
    """`check_many` in two programs of different sizes."""
    for _ in range(2):
        check_many(mesh, comm, rng, n_batches=5000)


def scanned(mesh, rng, case=None, **options) -> tuple[Any, tuple[Any, ...]]:
    """Layers replayed in a scan's backward pass, another collective in between; and arguments."""
    case = case or moe_checks.case_of(mesh.size)
    layer = moe_checks.layer_over(mesh, case, **options, **moe_checks.ROOM)

    def run(tokens, gates, experts, ids, placement):
        @jax.checkpoint
        def step(tokens, shift):
            out, traffic = layer(tokens, gates, experts, (ids + shift) % 5, placement)
            return tokens + out / (1 + jnp.abs(out).max()), traffic.slot_loads

        return lax.scan(step, tokens, jnp.arange(3, dtype=jnp.int32))

    (tokens, gates, experts), ids, placement = moe_checks.problem(
        rng, case, moe_checks.balanced, 16 * mesh.size
    )
    floats = (tokens, gates, moe_checks.in_slots(experts, placement))
    given = floats, rng.normal(0, 1, tokens.shape).astype(np.float32), ids
    given = jax.tree.map(lambda array: everywhere(mesh, array), given)
    placed = jax.tree.map(lambda array: everywhere(mesh, np.asarray(array), P()), placement)
    return moe_checks.with_slopes(run), (*given, placed)


def check_scan(mesh, comm, rng):
    """A scan of layers by peer memory equals one without comm."""
    peer, given = scanned(mesh, rng, comm=comm, transport="peer")
    padded, _ = scanned(mesh, rng, transport="padded")
    with jax.default_matmul_precision("highest"):
        both = peer(*given), padded(*given)
    for got, expected in zip(*map(jax.tree.leaves, both), strict=True):
        for a, b in zip(got.addressable_shards, expected.addressable_shards, strict=True):
            a, b = np.asarray(a.data), np.asarray(b.data)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * max(np.abs(b).max(), 1e-6))


def exchange_until_error(mesh, comm, on_call=lambda i: None) -> tuple[str, float]:
    """Sends tokens around until an error occurs; returns it and the duration of the last call."""
    n_ranks = mesh.size

    def rank(tokens, ids):
        options: dict[str, Any] = {
            "axis_name": "ep",
            "capacity": 64,
            "transport": "peer",
            "comm": comm,
        }
        gates = jnp.ones(ids.shape, jnp.float32)
        rows, _, plan = moe.dispatch(tokens, gates, assigned(ids, n_ranks), **options)
        return moe.combine(rows, plan)

    run = per_rank(rank, mesh, n_inputs=2)
    tokens = everywhere(mesh, np.ones((8 * n_ranks, 16), np.float32))
    ids = everywhere(mesh, (np.arange(8 * n_ranks, dtype=np.int32) % n_ranks)[:, None])
    for i in range(10_000):
        on_call(i)
        start = time.perf_counter()
        try:
            out = jax.block_until_ready(run(tokens, ids))
        except Exception as error:
            return str(error), time.perf_counter() - start
        for part in out.addressable_shards:
            here = np.asarray(part.data)
            assert ((here == 1) | np.isnan(here)).all(), "garbage came as a result"
    raise AssertionError("no error came")


def check_options(mesh, comm, rng):
    """With the transfers hidden, and without."""
    for options in (None, moe.COMPILER_OPTIONS):
        routings = (moe_checks.skewed, moe_checks.half_silent, moe_checks.nothing)
        check_layer(mesh, comm, rng, options=options, routings=routings)


def check_dtypes(mesh, comm, rng):
    check_parts(mesh, comm, rng, n_rounds=3, dtypes=("bfloat16", "float16", "float32"))


def check_copies_of_the_batch(mesh, comm, rng):
    check_anywhere(mesh, comm, rng, copies="batch")


COPY_CHECKS = [check_flights, check_options, check_scan]
CHECKS = [
    check_options, check_anywhere, check_copies_of_the_batch, check_dtypes, check_scan,
    check_ten_thousand,
]  # fmt: skip


def main() -> None:
    coordinator, n_processes, process, seed, scenario, transport = sys.argv[1:]
    process = int(process)
    jax.distributed.initialize(coordinator, int(n_processes), process, local_device_ids=[process])
    print(f"--seed={seed}", flush=True)
    rng = np.random.default_rng(int(seed))
    mesh = Mesh(np.array(jax.devices()), "ep")
    timeout_s = 3.0 if scenario == "killed" else 30.0
    windows, checks = (WITH_COPIES, COPY_CHECKS) if scenario == "copies" else (WINDOWS, CHECKS)
    if transport != "nvshmem":
        checks = [check_bits, *checks]
    comm = init_comm(mesh, max_experts=64, transport=transport, timeout_s=timeout_s, **windows)
    assert comm.transport == transport
    if scenario == "killed":

        def die(i):
            if process == 1 and i == 20:
                os._exit(0)

        error, seconds = exchange_until_error(mesh, comm, die)
        print(f"{seconds:.2f} s: {error}", flush=True)
        assert "DEADLINE_EXCEEDED" in error
        assert "of rank 1" in error
        assert seconds < timeout_s + 2
        os._exit(0)  # With a process missing, no orderly shutdown is possible.
    for check in checks:
        start = time.perf_counter()
        check(mesh, comm, rng)
        print(f"{check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    comm.close()
    print("all passed", flush=True)


if __name__ == "__main__":
    main()
