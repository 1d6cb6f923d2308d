"""Transport "peer" by its specification, on CPUs: against one device and against "padded"."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import moe_checks
import numpy as np
import peer_checks
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lplb_jax import _native, export_checks, init_comm, moe
from lplb_jax._native import warn_once
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm, _windows
from lplb_jax.moe.collectives import ListPlan
from lplb_jax.moe.peer import PeerPlan


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices[:4], "ep")


def comm_of(
    size,
    *,
    max_experts=64,
    max_tokens=64,
    hidden_bytes=64,
    top_k=3,
    capacity_factor=8.0,
    copy_bytes=0,
    transport="p2p",
):
    """A communicator without GPUs: its calls run the specification."""
    window = _windows(size, max_tokens, hidden_bytes, top_k, capacity_factor)
    options = {"max_experts": max_experts, "timeout_s": 1.0, "identifier": 1, "window": window}
    options["copy_bytes"] = copy_bytes
    return Comm(transport, "ep", size, **options)


def test_the_layer_equals_one_device(rng, mesh):
    peer_checks.check_layer(mesh, comm_of(4), rng, routings=moe_checks.ROUTINGS)


def test_another_balance_without_vma(rng, cpu_devices):
    mesh = Mesh(cpu_devices[:2], "ep")
    peer_checks.check_layer(mesh, comm_of(2), rng, balance="eplb", check_vma=False)


def test_any_placement(rng, cpu_devices):
    peer_checks.check_anywhere(Mesh(cpu_devices[:2], "ep"), comm_of(2), rng)


@pytest.mark.parametrize("copies", ["placement", "batch"])
def test_a_sub_axis_of_a_mesh(rng, cpu_devices, copies):
    mesh = Mesh(cpu_devices.reshape(2, 4), ("data", "ep"))
    peer_checks.check_sub_axis(mesh, comm_of(4, **peer_checks.WINDOWS), rng, copies)


def test_the_parts_equal_those_of_padded(rng, mesh):
    """Rows, gates, sums and derivatives in both directions, also with rows that do not fit."""
    peer_checks.check_parts(mesh, comm_of(4), rng, n_rounds=2)


def test_many_batches(rng, mesh):
    peer_checks.check_many(mesh, comm_of(4, max_tokens=256, hidden_bytes=1024), rng)


@pytest.mark.parametrize("max_experts", [1, 64])
def test_by_put(rng, mesh, max_experts):
    """Counts are then exchanged by a kernel of their own, if comm has room for all slots."""
    comm = comm_of(4, transport="nvshmem_put", max_experts=max_experts)
    has_room = comm.most_slots >= 4
    if has_room:
        peer_checks.check_layer(mesh, comm, rng)
    peer_checks.check_parts(mesh, comm, rng, n_rounds=1)
    shapes = [((8, 16), "float32"), ((8, 3), "float32"), ((8, 3), "int32"), ((8, 16), "float32")]
    operands = [jax.ShapeDtypeStruct((4 * n, k), dtype) for (n, k), dtype in shapes]
    run = peer_checks.both_ways(mesh, 24, transport="peer", comm=comm)
    targets = {f"lplb_{name}" for name in ("there", "back", "plan", "synced_plan", "sync")}
    with mock.patch.dict(_native.AVAILABLE, {"CUDA": tuple(targets)}):
        lowered = export.export(run, platforms=["cuda"], disabled_checks=export_checks())
        text = lowered(*operands).mlir_module()
    calls = set(re.findall(r"custom_call @(lplb_\w+)", text))
    assert calls - {"lplb_sync"} == targets - {"lplb_sync", "lplb_synced_plan"}
    assert ("lplb_sync" in calls) == has_room == ("stablehlo.all_gather" not in text)


@pytest.mark.parametrize("transport", ["peer", "padded"])
def test_no_empty_array_crosses_shard_map(rng, mesh, transport):
    """XLA's partitioner crashes over them, see `_native.call`."""
    run, given = peer_checks.scanned(mesh, rng, comm=comm_of(4), transport=transport)
    crossing = crossing_shard_map(run, given)
    assert not [line for line in crossing if re.search(r"tensor<([0-9]+x)*0x", line)]


def crossing_shard_map(run, given):
    """The types that enter and leave every `shard_map` of a scan of rematerialized layers."""
    text = run.lower(*given).as_text()
    starts = re.findall(r"sdy.manual_computation.*", text)
    ends = re.findall(r"^ *} : \(tensor.*", text, re.MULTILINE)
    assert len(ends) >= len(starts) > 3  # forward, what is known beforehand, replayed, backward
    return starts + ends


@pytest.mark.parametrize(
    ("width", "dtype", "words"),
    [
        (0, "float32", r"rows: .* hidden of at least 1, got \[384, 0\]"),
        (3, "float32", r"rows: .* multiple of 16 bytes .* got float32 \[384, 3\]"),
        (32, "float32", r"rows: expected at most 64 bytes .* got float32 .*; raise hidden_bytes"),
        (16, "float64", r"rows: expected at most 64 bytes .* got float64"),
        (64, "float8_e4m3fn", "rows: expected one of bfloat16"),
        (16, "float32", None),
        (8, "bfloat16", None),
    ],
)
def test_results_without_room_are_refused(mesh, width, dtype, words):
    """The experts' results may be of another width or dtype than the tokens."""

    def step(tokens, gates, ids):
        options = {"axis_name": "ep", "capacity": 384, "transport": "peer", "comm": comm_of(4)}
        rows, _, plan = moe.dispatch(tokens, gates, peer_checks.assigned(ids, 4), **options)
        return moe.combine(jnp.zeros((len(rows), width), dtype), plan)

    run = jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    shapes = [((64, 16), "float32"), ((64, 3), "float32"), ((64, 3), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with jax.enable_x64(dtype == "float64"):
        if words is None:
            assert jax.eval_shape(run, *arguments).shape == (64, width)
        else:
            with pytest.raises(ValueError, match=words):
                jax.eval_shape(run, *arguments)


@pytest.mark.parametrize("transport", ["peer", "padded", "auto"])
@pytest.mark.parametrize(
    ("n_tokens", "hidden", "top_k", "words"),
    [
        (0, 16, 3, "tokens: .* at least one token"),
        (16, 0, 3, "tokens: .* hidden of at least 1"),
        (16, 16, 0, "assignment: expected top_k of at least 1"),
    ],
)
def test_empty_batches_are_refused(mesh, transport, n_tokens, hidden, top_k, words):
    def step(tokens, gates, ids):
        options = {"axis_name": "ep", "capacity": 384, "transport": transport, "comm": comm_of(4)}
        slots = Assignment(ids, ids, jnp.zeros(4, jnp.int32))
        return moe.dispatch(tokens, gates, slots, **options)[0]

    run = jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    shapes = [((4 * n_tokens, hidden), "float32"), ((4 * n_tokens, top_k), "float32")]
    shapes += [((4 * n_tokens, top_k), "int32")]
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"comm": None}, "'peer' expects a comm with windows.*got comm=None"),
        (
            {"comm": Comm("p2p", "ep", 4, max_experts=64, timeout_s=1.0, identifier=1)},
            "'peer' expects a comm with windows.*got Comm",
        ),
        ({"max_tokens": 7}, "room for 21 tokens of 64 bytes.*needs 48"),
        ({"hidden_bytes": 32}, "of 32 bytes.*of 64 bytes"),
        ({"top_k": 2}, "top_k up to 2.*top_k = 3"),
        ({"capacity_factor": 1.0, "max_tokens": 16}, None),
        ({"max_experts": 1}, None),  # more slots than counts that its kernels can exchange
        ({"dtype": "float8_e4m3fn"}, "tokens: expected one of bfloat16"),
        ({"hidden": 3}, "multiple of 16 bytes"),
    ],
)
def test_what_has_no_room_is_refused(mesh, changed, words):
    """By "peer"; "auto" takes another transport, and says why once if comm has windows."""
    changed = dict(changed)
    hidden, dtype = changed.pop("hidden", 16), changed.pop("dtype", "float32")
    comm = changed["comm"] if "comm" in changed else comm_of(4, **changed)
    plans = []

    def send(transport, tokens, gates, ids):
        assigned = peer_checks.assigned(ids, 4)
        options = {"axis_name": "ep", "capacity": 384, "transport": transport, "comm": comm}
        rows, _, plan = moe.dispatch(tokens, gates, assigned, **options)
        plans.append(type(plan))
        return rows

    def evaluate(transport):
        over = functools.partial(send, transport)
        run = jax.shard_map(over, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        shapes = [((64, hidden), dtype), ((64, 3), "float32"), ((64, 3), "int32")]
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return plans.pop()

    warn_once.cache_clear()
    if words is None:
        assert evaluate("peer") == evaluate("auto") == PeerPlan
        return
    with pytest.raises(ValueError, match=words):
        evaluate("peer")
    if comm is None or comm.window is None:
        assert evaluate("auto") == ListPlan
    else:
        with pytest.warns(UserWarning, match=f"tokens do not travel by .*'peer'.*{words}"):
            assert evaluate("auto") == ListPlan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -1}, "max_tokens: expected a number of tokens"),
        ({"max_tokens": 8}, "hidden_bytes: expected"),
        ({"hidden_bytes": 8}, "max_tokens: expected a positive number with hidden_bytes"),
        ({"max_tokens": 8, "hidden_bytes": 8, "top_k": 33}, "top_k: expected at most 32, got 33"),
        ({"max_tokens": 8, "hidden_bytes": 8, "capacity_factor": 0.5}, "capacity_factor: .*0.5"),
        ({"sms": -1}, "sms: expected"),
        ({"copy_bytes": -1}, "copy_bytes: expected"),
        ({"copy_bytes": 8}, "max_tokens: expected a positive number with copy_bytes = 8"),
    ],
)
def test_bad_windows(mesh, options, words):
    with pytest.raises(ValueError, match=words):
        init_comm(mesh, max_experts=8, **options)


def test_windows_do_not_grow_with_the_ranks():
    """With enough ranks, the capacity is the limit."""
    sizes = [_windows(n, 1000, 8192, 8, 1.25).n_tokens for n in (2, 8, 16, 64, 256)]
    assert sizes == [1000, 7000, 10008, 10008, 10008]


def test_weights_do_not_travel_by_peers(mesh):
    weights = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    placement = moe_checks.AnyCase(4, 3, 8).placement(np.random.default_rng())

    def fetch(weights):
        return moe.replicate_weights(weights, axis_name="ep", placement=placement, transport="peer")

    run = jax.shard_map(fetch, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(ValueError, match=r"^transport: expected one of auto.*got 'peer'"):
        jax.eval_shape(run, weights)


@pytest.mark.parametrize("routing", [moe_checks.skewed, moe_checks.nothing])
def test_copies_in_flight(rng, mesh, routing):
    """The layer equals one device also where copies fly by themselves."""
    comm = comm_of(4, copy_bytes=1 << 20)
    peer_checks.check_layer(mesh, comm, rng, routings=(routing,))
    peer_checks.check_flights(mesh, comm, rng)


def test_copies_without_room(mesh):
    comm = comm_of(4, copy_bytes=64)
    with pytest.raises(ValueError, match=r"^comm: .*64 bytes of copies.*raise copy_bytes"):
        peer_checks.check_layer(mesh, comm, np.random.default_rng())
