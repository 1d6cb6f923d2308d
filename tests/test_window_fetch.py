"""Copies of experts through the windows of transport "peer", by its specification."""

import functools
import re
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import peer_checks
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import AnyCase
from test_moe_slots import hot, slots_used
from test_peer import comm_of, crossing_shard_map

from lplb_jax import _native, export_checks
from lplb_jax._axes import varying_as
from lplb_jax._problem import check_problem
from lplb_jax.moe import slots, transports, weights
from lplb_jax.moe.peer import Peer
from lplb_jax.moe.transfers import one_by_one
from lplb_jax.moe.transports import COLLECTIVES
from lplb_jax.moe.window_fetch import WindowFetch, piece_length, window_fetch


@pytest.mark.parametrize("sizes", [(8, 5, 19), (4, 5, 6), (2, 4, 4), (8, 6, 16)])
def test_copies_and_sums_of_their_gradients(rng, cpu_devices, sizes):
    """Integers, so that sums are exact in any order: against NumPy."""
    n_ranks, n_slots, n_logical = sizes
    case, shapes = AnyCase(*sizes), [(3, 16), (5, 2, 8), (3, 4)]  # rows of 16, 16 and 12 numbers
    mesh = Mesh(cpu_devices[:n_ranks], "ep")
    comm = comm_of(n_ranks, max_tokens=512, hidden_bytes=64, top_k=8)

    @functools.partial(jax.jit, static_argnames="fan_out")
    def both_ways(placement, loads, own, cts, *, fan_out):
        def rank(own, cts):
            order = slots.slots_by_row(placement)
            fetch = window_fetch(
                placement, order, "ep", own, comm, slot_loads=loads, fan_out=fan_out, n_nodes=None,
                relays=False,
            )  # fmt: skip
            assert isinstance(fetch, WindowFetch)
            assert fetch.together(own) == [[0, 1], [2]]
            zero = varying_as(jnp.zeros(1), own[0])
            _, rows = one_by_one(fetch.together(own), fetch.delivered, zero, own)
            held = list(map(fetch.write_into, own, rows))
            _, home = one_by_one(fetch.together(cts), fetch.sent_home, zero, cts)
            slopes = list(map(fetch.accumulate, cts, home))
            received = fetch.journeys.received
            there = (received[..., None] == jnp.arange(fetch.n_copies)).any(axis=(0, 1))
            return held, slopes, there

        run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        return *run(own, cts), slots.slots_by_row(placement)

    for turn in range(4):
        placement = hot(rng, case) if turn % 2 else case.placement(rng)
        loads = slots_used(rng, placement).astype(np.int32)
        n_rows = -(-n_logical // n_ranks) + slots.room_for(placement)
        n_local = -(-n_logical // n_ranks)
        sizes = [(n_ranks * n_rows, *shape) for shape in shapes]
        own, cts = (
            [rng.integers(-50, 50, size).astype(np.float32) for size in sizes] for _ in range(2)
        )
        held, slopes, there, order = both_ways(placement, loads, own, cts, fan_out=None)
        there, order = np.asarray(there), np.asarray(order)
        held, slopes, own, cts = (
            np.concatenate([np.reshape(array, (n_ranks, n_rows, -1)) for array in arrays], axis=2)
            for arrays in (held, slopes, own, cts)
        )
        table = placement.phy2log.reshape(n_ranks, n_slots)
        want_held, want = own.copy(), cts.copy()
        there = there.reshape(n_ranks, -1)
        expert = np.full(order.shape, -1)
        filled = order < n_slots
        expert[filled] = table[np.nonzero(filled)[0], order[filled]]
        n_moved = 0
        for r, c in np.argwhere(there):
            moved = expert[r, n_local + c]
            owner = placement.log2phy[moved, 0] // n_slots
            row = int(np.flatnonzero(expert[owner, :n_local] == moved)[0])
            assert owner != r
            want_held[r, n_local + c] = own[owner, row]
            want[owner, row] += cts[r, n_local + c]
            n_moved += 1
        want[:, n_local:] = 0
        used = loads.reshape(table.shape)
        busy = sum(
            used[r, order[r, n_local + c]] > 0 and placement.log2phy[e, 0] // n_slots != r
            for r, c in np.argwhere(expert[:, n_local:] >= 0)
            for e in [expert[r, n_local + c]]
        )
        assert n_moved == busy
        kept = np.concatenate([np.ones((n_ranks, n_local), bool), there], axis=1)
        np.testing.assert_array_equal(held[kept], want_held[kept])
        np.testing.assert_array_equal(slopes, want)


def test_no_rank_sends_more_than_its_limit(rng, cpu_devices):
    """Gradients of copies beyond `fan_out` have no room, so those copies do not travel."""
    placement, n_ranks = hot(rng, AnyCase(8, 5, 19)), 8
    loads = slots_used(rng, placement).astype(np.int32)
    comm = comm_of(n_ranks, max_tokens=512, hidden_bytes=32, top_k=8)

    def rank(own):
        fetch = window_fetch(
            placement, slots.slots_by_row(placement), "ep", own, comm,
            slot_loads=jnp.asarray(loads), fan_out=2, n_nodes=None, relays=False,
        )  # fmt: skip
        assert isinstance(fetch, WindowFetch)
        assert fetch.n_received == 2
        return fetch.journeys.lists[0]

    mesh = Mesh(cpu_devices[:n_ranks], "ep")
    run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P(), out_specs=P("ep")))
    sent = np.asarray(run(jnp.zeros((8, 3, 8)))).reshape(n_ranks, n_ranks)
    assert sent.sum(axis=1).max() == 2


@pytest.mark.parametrize("copies", ["batch", "placement"])
def test_the_layer_takes_it(rng, cpu_devices, copies):
    """Value and gradients equal those on one device, of copies kept or fetched again."""
    mesh, comm = Mesh(cpu_devices[:4], "ep"), comm_of(4, **peer_checks.WINDOWS)
    taken = []

    def seen(*given, **options):
        taken.append(window_fetch(*given, **options))
        return taken[-1]

    with mock.patch.object(weights, "window_fetch", seen):
        peer_checks.check_anywhere(mesh, comm, rng, copies)
    assert taken
    assert all(isinstance(fetch, WindowFetch) for fetch in taken)


def test_copies_come_to_their_place(rng, cpu_devices):
    """On GPUs, the call that receives them shares its buffer with the weights."""
    mesh, comm = Mesh(cpu_devices[:4], "ep"), comm_of(4, **peer_checks.WINDOWS)
    run, given = peer_checks.scanned(
        mesh, rng, AnyCase(4, 5, 12), comm=comm, transport="peer", copies="batch"
    )
    with mock.patch.dict(_native.AVAILABLE, {"CUDA": ("lplb_there", "lplb_weights_there")}):
        lowered = export.export(run, platforms=["cuda"], disabled_checks=export_checks())
        text = lowered(*given).mlir_module()
    of_weights = re.findall(r"custom_call @lplb_weights_there.*", text)
    of_tokens = re.findall(r"custom_call @lplb_there.*", text)
    assert of_weights
    assert of_tokens
    for k in range(2):  # gate_up and down
        shares = f"output_operand_alias<output_tuple_indices = [{k}], operand_index = {k}"
        assert all(shares in line for line in of_weights)
    assert not any("output_operand_alias" in line for line in of_tokens)


@pytest.mark.parametrize(
    "how",
    [{}, {"copies": "batch"}, {"copies": "batch", "keep_copies": False}, {"balance": "none"},
     {"tile": 4, "base_load": np.arange(4, dtype=np.int32), "n_nodes": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("transport", ["peer", "padded"])
def test_no_empty_array_crosses_shard_map(rng, cpu_devices, transport, how):
    """XLA's partitioner crashes over them where layers are replayed, see `_native.call`."""
    mesh, comm = Mesh(cpu_devices[:4], "ep"), comm_of(4, **peer_checks.WINDOWS)
    how = how | {"transport": transport, "comm": comm if transport == "peer" else None}
    run, given = peer_checks.scanned(mesh, rng, AnyCase(4, 5, 12), **how)
    crossing = crossing_shard_map(run, given)
    assert not [line for line in crossing if re.search(r"tensor<([0-9]+x)*0x", line)]


@pytest.mark.parametrize(
    ("n_ranks", "collective", "again", "windows"),
    [
        (4, "ragged", False, True), (4, "ragged", True, False), (4, "padded", False, True),
        (8, "ragged", False, False), (8, "padded", False, True), (8, "padded", True, False),
    ],
)  # fmt: skip
def test_when_windows_take_them(rng, cpu_devices, n_ranks, collective, again, windows):
    """Not where a collective relays hot experts, nor where copies are fetched again."""
    placement = hot(rng, AnyCase(n_ranks, 5, 2 * n_ranks))
    problem = check_problem(None, None, placement, None)
    comm = comm_of(n_ranks, max_tokens=512, hidden_bytes=64, top_k=8)
    found = []

    def rank(own, loads):
        counted = SimpleNamespace(slot_loads=loads, axis_name="ep")
        order = slots.slots_by_row(placement)
        found.append(weights.fetch_for(own, problem, order, counted, Peer(comm), None, again=again))
        return own

    def of_weights(carrier, n_ranks):
        return COLLECTIVES[collective]

    with mock.patch.object(transports, "for_weights", of_weights):
        run = jax.shard_map(
            rank, mesh=Mesh(cpu_devices[:n_ranks], "ep"), in_specs=(P("ep"), P()), out_specs=P("ep")
        )
        own = jax.ShapeDtypeStruct((n_ranks * 7, 8, 16), jnp.float32)
        jax.eval_shape(run, own, jax.ShapeDtypeStruct((placement.n_physical,), jnp.int32))
    assert type(found[0]) is (WindowFetch if windows else slots.FetchAnywhere)


def test_without_room_another_transport_carries_them(rng, cpu_devices):
    """Too small windows, too many copies of an expert, or types that the kernels cannot add."""
    placement = AnyCase(4, 5, 6).placement(rng)
    experts = np.zeros((2, 8, 16), np.float32)

    def taken(experts, **change):
        """Whether windows of these sizes take them."""
        comm = comm_of(4, **{"max_tokens": 512, "hidden_bytes": 64, "top_k": 8, **change})
        loads = jnp.ones(placement.n_physical, jnp.int32)
        found = []

        def rank(own):
            options = {"slot_loads": loads, "fan_out": None, "n_nodes": None, "relays": False}
            order = slots.slots_by_row(placement)
            found.append(window_fetch(placement, order, "ep", experts, comm, **options))
            return own

        mesh = Mesh(cpu_devices[:4], "ep")
        jax.eval_shape(jax.shard_map(rank, mesh=mesh, in_specs=P(), out_specs=P()), loads)
        return found[0] is not None

    assert taken(experts)
    assert not taken(experts, max_tokens=1)
    assert not taken(experts, top_k=1)
    assert not taken(experts.astype(np.int8))
    assert not taken(experts[:, :1, :3])


@pytest.mark.parametrize(
    ("shape", "dtype", "length"),
    [((8, 16), "float32", 16), ((4096, 3072), "bfloat16", 32), ((3, 5), "float32", None),
     ((7, 4), "float32", 14 * 2 // 7), ((6,), "float64", 6), ((1, 2), "bfloat16", None)],
)  # fmt: skip
def test_rows_are_as_long_as_fits(shape, dtype, length):
    """Divisors of an expert, of at most 64 bytes and multiples of 16."""
    assert piece_length([jax.ShapeDtypeStruct((2, *shape), dtype)], 64) == length
