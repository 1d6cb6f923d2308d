"""Every error is raised at trace time and names the argument, what was expected and what it got."""

import dataclasses
import re
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case, layers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from steps import repeated

from lplb_jax import (
    Split,
    assign,
    count_loads,
    init_comm,
    place_experts,
    rebalance,
    solve,
    sync_loads,
    topologies,
)
from lplb_jax._native import warn_once

RING = topologies.ring(4)
CASE = Case(RING, 4)
PLACEMENT = CASE.placement()
IDS = np.zeros((4, 5), np.int32)
LOADS = np.ones((4, 16), np.int32)
SPLIT = Split(np.zeros(PLACEMENT.n_physical, np.int32), *np.zeros((3, 1), np.int32))


def changed(**arrays):
    return type(PLACEMENT)(**{**vars(PLACEMENT), **arrays})


def swapped():
    """Two experts swapped in phy2log only."""
    phy2log = PLACEMENT.phy2log.copy()
    phy2log[[0, 1]] = phy2log[[1, 0]]
    return phy2log


def reversed_without_topology():
    """Along a different topology, without recording it."""
    return dataclasses.replace(Case(RING[::-1], 4).placement(), topology=None)


BAD_INDICES = [
    (IDS.astype(np.float32), TypeError, "float32"),
    (IDS.astype(bool), TypeError, "bool"),
    (IDS.astype(np.int16), TypeError, "int16"),
    (IDS.astype(np.uint32), TypeError, "uint32"),
    (np.zeros(3, np.int8), TypeError, "int8"),
    ([0.5], TypeError, "float64"),
    ("experts", TypeError, "str"),
    (None, TypeError, "object"),
]
BAD_LOADS = [
    (LOADS.astype(np.float16), TypeError, "int32.*got float16"),
    (LOADS.astype(np.int64), TypeError, "int32.*got int64"),
    (LOADS.astype(np.uint32), TypeError, "int32.*got uint32"),
    (LOADS.tolist(), TypeError, "int32.*got list"),
    (np.int32(3), ValueError, r"\[n_logical\] or \[ep_size, n_logical\], got \[\]"),
    (LOADS[None], ValueError, r"got \[1, 4, 16\]"),
    (LOADS[:3], ValueError, r"\[4, 16\], got \[3, 16\]"),
    (LOADS[:, :8], ValueError, r"\[16\].*\[4, 16\], got \[4, 8\]"),
    (LOADS[0, :15], ValueError, r"got \[15\]"),
    (LOADS[:, :0], ValueError, r"got \[4, 0\]"),
]
BAD_R2O = [
    (np.array([[0], [0], [1], [2]]), ValueError, "permutation .* got column 0"),
    (np.zeros(4, int), ValueError, r"\[group_size, n_columns\].*got \(4,\)"),
    (RING.astype(float), TypeError, "integers, got dtype float64"),
]
BAD_PLACEMENTS = [
    (PLACEMENT.phy2log, TypeError, "^placement: expected a lplb_jax.Placement.* got ndarray"),
    (changed(phy2log=PLACEMENT.phy2log.astype(np.int64)), TypeError, r"phy2log: .*got int64"),
    (changed(log2phy=PLACEMENT.log2phy.tolist()), TypeError, r"log2phy: .*got list"),
    (changed(phy2log=PLACEMENT.phy2log[:-1]), ValueError, "n_physical = 19"),
    (changed(logcnt=PLACEMENT.logcnt[:-1]), ValueError, r"logcnt \[16\].*got logcnt \[15\]"),
    (changed(log2phy=PLACEMENT.log2phy[:, :1]), ValueError, r"max_replicas.*got \[16, 1\]"),
    (changed(ep_size=5), ValueError, "placement|ep_size"),
    (
        changed(ep_size=2, topology=None),
        ValueError,
        "ep_size: expected a multiple .* 4 of r2o, got 2",
    ),
    (repeated(PLACEMENT, 3), ValueError, r"1, 2 and 1 dimensions.*got \(2, 3, 2\).*jax.vmap"),
    (changed(phy2log=swapped()), ValueError, "placement: expected every expert once"),
    (changed(logcnt=PLACEMENT.logcnt + 1), ValueError, "placement: expected every expert once"),
    (changed(phy2log=PLACEMENT.phy2log * 0), ValueError, "placement: expected every expert once"),
    (
        Case(RING[::-1], 4).placement(),
        ValueError,
        r"^r2o: expected placement.topology, Topology\(.*got T",
    ),
    (reversed_without_topology(), ValueError, "another arrangement"),
]


def refused(error, words, function, *operands):
    """The message names the argument, what was expected and what it got."""
    with pytest.raises(error, match=words) as raised:
        function(*operands)
    assert "expected" in str(raised.value)
    assert "got" in str(raised.value)


@pytest.mark.parametrize(("indices", "error", "words"), BAD_INDICES)
def test_indices(indices, error, words):
    words = f"^indices: expected dtype int32, .* got .*{words}"
    refused(error, words, lambda: count_loads(indices, 16))
    refused(error, words, lambda: rebalance(indices, None, RING, placement=PLACEMENT))
    refused(error, words, lambda: assign(indices, None, SPLIT, RING, placement=PLACEMENT))


@pytest.mark.parametrize("dtype", [np.float32, np.int16, bool])
def test_traced_indices(dtype):
    balance = jax.jit(lambda ids: rebalance(ids, None, RING, placement=PLACEMENT))
    refused(TypeError, f"^indices: .*got {np.dtype(dtype)}", balance, IDS.astype(dtype))


@pytest.mark.parametrize(("loads", "error", "words"), BAD_LOADS)
def test_loads(loads, error, words):
    words = f"^loads: expected .*{words}"
    refused(error, words, lambda: solve(loads, RING, placement=PLACEMENT))
    refused(error, words, lambda: rebalance(IDS, loads, RING, placement=PLACEMENT))
    refused(error, words, lambda: assign(IDS, loads, SPLIT, RING, placement=PLACEMENT))


def test_real_loads_have_no_tokens():
    loads = LOADS.astype(np.float32)
    words = "^loads: expected an int32 array, got float32"
    refused(TypeError, words, lambda: rebalance(IDS, loads, RING, placement=PLACEMENT))
    refused(TypeError, words, lambda: assign(IDS, loads, SPLIT, RING, placement=PLACEMENT))


@pytest.mark.parametrize(("loads", "error", "words"), BAD_LOADS[4:])
def test_traced_loads(loads, error, words):
    run = jax.jit(lambda loads: rebalance(IDS, loads, RING, placement=PLACEMENT))
    refused(error, f"^loads: expected .*{words}", run, loads)


@pytest.mark.parametrize(
    ("shape", "r2o", "words"),
    [
        ((4, 18), RING, "^n_logical: expected a multiple of ep_size = 4, got 18"),
        ((6, 24), RING, "^ep_size: expected a multiple of the group size 4 .* got 6"),
        ((4,), topologies.complete(4), "^redundants_per_rank: .* the 1 experts of a rank, got 3"),
    ],
)
def test_loads_that_do_not_divide(shape, r2o, words):
    """Without a placement, its sizes come from the loads."""
    refused(ValueError, words, solve, np.ones(shape, np.int32), r2o)


@pytest.mark.parametrize(("r2o", "error", "words"), BAD_R2O)
def test_r2o(r2o, error, words):
    words = f"^r2o: expected .*{words}"
    refused(error, words, lambda: solve(LOADS, r2o))
    refused(error, words, lambda: rebalance(IDS, LOADS, r2o))
    refused(error, words, lambda: assign(IDS, LOADS, SPLIT, r2o))
    sizes: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1}
    refused(error, words, lambda: place_experts(None, r2o, **sizes))


def test_no_r2o():
    """The placement provides it; without one, the holders of copies are unknown."""
    words = "^r2o: expected a topology, got None with no placement; pass one"
    refused(ValueError, words, lambda: solve(LOADS))
    refused(ValueError, words, lambda: rebalance(IDS, LOADS))
    refused(ValueError, words, lambda: assign(IDS, LOADS, SPLIT))


def test_traced_r2o():
    run = jax.jit(lambda r2o: solve(LOADS, r2o))
    words = "^r2o: expected a static array .* got a traced value; close over"
    refused(TypeError, words, run, np.asarray(RING))


@pytest.mark.parametrize(("placement", "error", "words"), BAD_PLACEMENTS)
def test_placement(placement, error, words):
    refused(error, words, lambda: solve(LOADS, RING, placement=placement))
    refused(error, words, lambda: rebalance(IDS, LOADS, RING, placement=placement))
    refused(error, words, lambda: assign(IDS, LOADS, SPLIT, RING, placement=placement))


def test_traced_placement_shapes():
    """Shapes are known under jit, so they raise there too."""

    def run(placement, r2o=RING):
        return jax.jit(lambda placement: solve(LOADS, r2o, placement=placement))(placement)

    refused(ValueError, "dimensions", run, repeated(PLACEMENT, 2))
    refused(ValueError, "n_physical = 19", run, changed(phy2log=PLACEMENT.phy2log[:-1]))
    refused(ValueError, "^r2o: expected placement.topology", run, PLACEMENT, topologies.cube())
    refused(ValueError, "^ep_size", run, changed(topology=None), topologies.cube())


def test_placement_is_needed_to_count():
    words = "^placement: expected a Placement where loads is None.* got None; make one with"
    refused(ValueError, words, lambda: rebalance(IDS, None, RING))
    refused(ValueError, words, lambda: assign(IDS, None, SPLIT, RING))


@pytest.mark.parametrize("indices", [IDS[:3], IDS.ravel(), np.int32(0), IDS[None]])
def test_sources(indices):
    """Counts by source need tokens by source."""
    words = r"^indices: expected a leading axis of ep_size = 4 source ranks, got shape \["
    refused(ValueError, words, lambda: rebalance(indices, LOADS, RING))
    refused(ValueError, words, lambda: assign(indices, LOADS, SPLIT, RING))


@pytest.mark.parametrize("solver", ["Exact", "", None, "interior-point", 1])
def test_solver(solver):
    words = "^solver: expected one of auto, exact, ipm, got "
    refused(ValueError, words, lambda: solve(LOADS, RING, solver=solver))
    refused(ValueError, words, lambda: rebalance(IDS, LOADS, RING, solver=solver))


@pytest.mark.parametrize("split", [None, tuple(SPLIT), SPLIT._replace(quota=SPLIT.quota[1:])])
def test_split(split):
    words = r"^split: expected a Split with quota \[20\], got "
    refused(ValueError, words, lambda: assign(IDS, LOADS, split, RING))


@pytest.mark.parametrize("value", [None, [1] * 20])
def test_quota_and_counts_that_are_no_arrays(cpu_devices, value):
    split = SPLIT._replace(quota=value)
    words = "^split.quota: expected an array, .*, got "
    refused(TypeError, words, lambda: assign(IDS, LOADS, split, RING))
    if value is None:  # lists are taken
        words = "^counts: expected an array, .*, got NoneType"
        refused(TypeError, words, in_shard_map(cpu_devices, lambda _: sync_loads(value, "ep")))


@pytest.mark.parametrize("positions", [None, "yes", 2])
def test_positions(positions):
    words = "^positions: expected a static True or False, got "
    options = {"placement": PLACEMENT, "positions": positions}
    refused(TypeError, words, lambda: rebalance(IDS, None, RING, **options))
    refused(TypeError, words, lambda: assign(IDS, LOADS, SPLIT, RING, **options))


@pytest.mark.parametrize("n_logical", [0, -1, 2.0, "3", None, True])
def test_n_logical(n_logical):
    words = "^n_logical: expected a static integer of at least 1, got "
    refused(ValueError, words, lambda: count_loads(IDS, n_logical))


def test_axis_out_of_scope():
    words = "^axis_name: expected an axis of an enclosing jax.shard_map, got 'ep', which is not in"
    options = {"placement": PLACEMENT, "axis_name": "ep"}
    refused(ValueError, words, lambda: rebalance(IDS, None, RING, **options))
    refused(ValueError, words, lambda: jax.jit(lambda: sync_loads(LOADS[0], "ep"))())
    refused(ValueError, words, lambda: assign(IDS, LOADS, SPLIT, RING, **options))


NO_AXIS_NAMES = [3, ["ep"], (), ("ep", "ep"), ("ep", 3), {"ep"}, (["ep"],), True]


@pytest.mark.parametrize("axis_name", NO_AXIS_NAMES)
def test_axis_that_is_no_name(cpu_devices, axis_name):
    """The same message everywhere, at the start of each call, inside and outside shard_map."""
    words = "^axis_name: expected a mesh axis's name or a tuple of different names, got "
    options = {"placement": PLACEMENT, "axis_name": axis_name}
    calls = [
        lambda ids: sync_loads(count_loads(ids, 16), axis_name),
        lambda ids: rebalance(ids, None, RING, **options)[0],
        lambda ids: assign(ids, LOADS, SPLIT, RING, **options),
    ]
    for call in calls:
        refused(ValueError, words, lambda call=call: call(IDS))
        refused(ValueError, words, in_shard_map(cpu_devices, call))
    words = words.replace("axis_name", "axis")
    mesh = Mesh(cpu_devices, "ep")
    refused(ValueError, words, lambda: init_comm(mesh, axis_name, max_experts=16))


def in_shard_map(cpu_devices, function):
    mesh = Mesh(cpu_devices, "ep")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    return lambda: jax.jit(mapped)(np.zeros((8, 5), np.int32))


@pytest.mark.parametrize(
    ("axes", "ep_size", "warned"),
    [
        ({"ep": 4}, 4, "'ep'"),
        ({"data": 2, "ep": 4}, 4, "'ep'"),
        ({"x": 2, "y": 2}, 4, r"\('x', 'y'\)"),
        ({"data": 2}, 4, None),
        ({"ep": 8}, 4, None),
        ({"data": 1}, 1, None),
    ],
)
def test_shards_that_balance_alone(cpu_devices, axes, ep_size, warned):
    """Shards of another number may each hold the tokens of all ranks."""
    devices = cpu_devices[: np.prod([*axes.values()])].reshape(*axes.values())
    case = Case(topologies.ring(ep_size) if ep_size > 1 else np.array([[0]]), 4)
    options: dict[str, Any] = {"placement": case.placement()}
    split = Split(np.zeros(case.placement().n_physical, np.int32), *np.zeros((3, 1), np.int32))
    named = {**options, "axis_name": ("x", "y") if "x" in axes else "ep"}
    calls = {
        "rebalance": lambda ids: rebalance(ids, None, case.r2o, **options)[0],
        "assign": lambda ids: assign(ids, None, split, case.r2o, **options),
        "positions": lambda ids: rebalance(ids, None, case.r2o, positions=True, **options)[0][0],
    }
    if warned is not None:
        calls["named"] = lambda ids: rebalance(ids, None, case.r2o, **named)[0]
    for name, call in calls.items():
        for check_vma in (True, False):
            run = jax.shard_map(
                call,
                mesh=Mesh(devices, tuple(axes)),
                in_specs=P(tuple(axes)),
                out_specs=P(tuple(axes)),
                check_vma=check_vma,
            )
            warn_once.cache_clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                jax.eval_shape(run, np.zeros((8, 5), np.int32))
            told = [str(one.message) for one in caught if "axis_name" in str(one.message)]
            assert len(told) == (warned is not None and check_vma and name != "named"), name
            for words in told:
                assert re.match(f"axis_name: expected .*got None.*Pass axis_name={warned}; ", words)


def test_axis_of_another_size(cpu_devices):
    def rank(ids):
        return rebalance(ids, None, RING, placement=PLACEMENT, axis_name="ep")[0]

    words = "^axis_name: .* as large as placement.ep_size = 4, got 'ep' of size 8"
    refused(ValueError, words, in_shard_map(cpu_devices, rank))


def test_axis_that_is_not_of_the_mesh(cpu_devices):
    def rank(ids):
        return rebalance(ids, None, RING, placement=PLACEMENT, axis_name="expert")[0]

    refused(ValueError, "^axis_name: .*got 'expert'", in_shard_map(cpu_devices, rank))


@pytest.mark.parametrize("r2o", [topologies.cube(), None])
@pytest.mark.parametrize("loads", [None, np.ones((8, 64), np.int32)])
def test_sharded_placement(cpu_devices, r2o, loads):
    """With given loads, or if a part of it contradicts itself."""
    case = Case(topologies.cube(), 8)
    placement = case.placement()
    if r2o is None:
        placement = dataclasses.replace(placement, topology=None)

    def rank(ids, placement):
        return rebalance(ids, loads, r2o, placement=placement, axis_name="ep")[0]

    mesh = Mesh(cpu_devices, "ep")
    run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    words = r"^placement: .*varies over 'ep'; pass it to jax.shard_map with in_specs P\(\)"
    ids = np.zeros((8, 5), np.int32)
    refused(ValueError, words, lambda: jax.eval_shape(run, ids, placement))


def test_assign_needs_the_gathered_counts(cpu_devices):
    case = Case(topologies.cube(), 2)
    split = solve(np.ones(16, np.int32), case.r2o)

    def rank(ids):
        return assign(ids, None, split, case.r2o, placement=case.placement(), axis_name="ep")

    words = "^loads: expected the gathered counts .*got None; pass sync_loads"
    refused(ValueError, words, in_shard_map(cpu_devices, rank))


def test_stacked_layers_are_taken_one_by_one(rng):
    """The advice in the message about leading axes works."""
    stacked = repeated(CASE.placement(rng), 2)
    loads = rng.integers(0, 9, (2, 16)).astype(np.int32)
    splits = jax.vmap(lambda loads, placement: solve(loads, RING, placement=placement))(
        loads, stacked
    )
    for i, placement in enumerate(layers(stacked)):
        assert splits.max_load[i] == solve(loads[i], RING, placement=placement).max_load


def test_an_error_leaves_nothing_behind(rng):
    """The next, valid call gives the right result."""
    before = rebalance(IDS, LOADS, RING)
    for bad in (LOADS[:3], LOADS.astype(np.int64), None):
        with pytest.raises((TypeError, ValueError)):
            rebalance(IDS, bad, RING)
    after = rebalance(IDS, LOADS, RING)
    jax.tree.map(np.testing.assert_array_equal, before, after)
