"""Meshes with axes besides the expert-parallel one: automatic, explicit, in any order."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, counts_of, tokens
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import assert_same

from lplb_jax import assign, count_loads, metrics, rebalance, solve, sync_loads, topologies

VMA = pytest.mark.parametrize("check_vma", [True, False])
RING = topologies.ring(2)
PAIR = Case(RING, 4)  # two ranks, so that other axes of a mesh of eight can have size two
EXTRA_AXES = [("data",), ("data", "tp"), ("data", "tp", "pipe")]


def mesh_of(devices, names, axis_type=AxisType.Auto, shape=None):
    """Axes of size two, or one if no devices are left."""
    shape = shape or (2, 2, 2, 1)[: len(names)]
    devices = devices[: np.prod(shape)].reshape(shape)
    return Mesh(devices, names, axis_types=(axis_type,) * len(names))


@VMA
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_tuple_of_axes_numbers_the_ranks(rng, cpu_devices, order, check_vma):
    """The last axis of the tuple is the fastest, whatever the order of the mesh."""
    mesh = mesh_of(cpu_devices, ("a", "b"), shape=(2, 4))
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    ids = tokens(rng, case, 60)

    def step(ids):
        options = {"placement": placement, "axis_name": order}
        physical, split = rebalance(ids, None, case.r2o, **options)
        gathered = sync_loads(count_loads(ids, case.n_logical), order)
        step_by_step = assign(ids, gathered, split, case.r2o, **options)
        return physical, step_by_step, split, gathered

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=P(order),
        out_specs=(P(order), P(order), P(), P()),
        check_vma=check_vma,
    )
    loads = counts_of(ids, case.n_logical)
    physical, split = rebalance(ids, loads, case.r2o, placement=placement)
    assert_same(jax.jit(sharded)(ids), (physical, physical, split, jnp.asarray(loads)))


@VMA
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("others", EXTRA_AXES)
def test_other_axes_are_not_manual(rng, cpu_devices, others, axis_type, check_vma):
    """Only the expert-parallel axis is; along the others the tokens are sharded."""
    mesh = mesh_of(cpu_devices, ("ep", *others), axis_type)
    placement = PAIR.placement(rng)
    ids = tokens(rng, PAIR, 60)

    def step(ids, placement):
        counts = count_loads(ids, PAIR.n_logical)
        options = {"placement": placement, "axis_name": "ep", "positions": True}
        assigned, split = rebalance(ids, None, RING, **options)
        return assigned._replace(counts=assigned.counts[None]), split, sync_loads(counts, "ep")

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("ep"), P()),
        out_specs=(P("ep"), P(), P()),
        axis_names={"ep"},
        check_vma=check_vma,
    )
    along = jax.device_put(ids, NamedSharding(mesh, P("ep", others[0])))
    loads = counts_of(ids, PAIR.n_logical)
    expected = rebalance(ids, loads, RING, placement=placement, positions=True)
    with jax.set_mesh(mesh):
        assert_same(jax.jit(sharded)(along, placement), (*expected, jnp.asarray(loads)))


@pytest.fixture(params=[True, False], ids=["current mesh", "other mesh"])
def explicit(request, cpu_devices):
    """Puts arrays on a mesh of explicit axes x and y, whether or not it is the current one."""
    mesh = mesh_of(cpu_devices, ("x", "y"), AxisType.Explicit, shape=(4, 2))
    with jax.set_mesh(mesh) if request.param else contextlib.nullcontext():
        yield lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))


def solve_and_assign(ids, loads, placement):
    split = solve(loads, RING, placement=placement)
    return split, assign(ids, loads, split, RING, placement=placement, positions=True)


def by_statistics(ids, loads, placement):
    return rebalance(ids, loads.sum(0, jnp.int32), RING, placement=placement)


def interior_point(ids, loads, placement):
    return solve(loads, RING, placement=placement, rank_weights=np.ones(2))


def measured(ids, loads, placement):
    counts = loads.sum(0, jnp.int32)
    home, even = metrics.home_quota(counts, placement), metrics.even_quota(counts, placement)
    ranks = metrics.rank_loads(home, PAIR.ep_size), metrics.rank_loads(even, PAIR.ep_size)
    moved = metrics.tokens_moved(even, placement)
    weights = [of(placement, placement) for of in (metrics.experts_fetched, metrics.homes_moved)]
    return home, even, ranks, moved, weights, metrics.imbalance(ranks[0]), metrics.gain(*ranks)


# Public calls over ids `[2, tokens]`, loads by source, and a placement.
BALANCES = {
    "count_loads": lambda ids, loads, placement: count_loads(ids, PAIR.n_logical),
    "counted": lambda ids, loads, p: rebalance(ids, None, RING, placement=p, positions=True),
    "by source": lambda ids, loads, p: rebalance(ids, loads, RING, placement=p, positions=True),
    "by statistics": by_statistics,
    "interior point": interior_point,
    "solve and assign": solve_and_assign,
}


# Without jit, JAX compiles every operation of `measured` for every sharding.
JITTED = BALANCES | {"metrics": measured}
HOW = [(name, jit, True) for name in BALANCES for jit in (False, True)]
HOW += [(name, True, False) for name in JITTED]


@pytest.mark.parametrize(("name", "jitted", "explicit"), HOW, indirect=["explicit"])
def test_explicit_axes_outside_shard_map(rng, explicit, name, jitted):
    """Arrays may be sharded in any way; results per token are sharded like the tokens."""
    placement = PAIR.placement(rng)
    ids = tokens(rng, PAIR, 40)
    loads = counts_of(ids, PAIR.n_logical)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.tree.map(np.asarray, JITTED[name](ids, loads, placement))
    run = jax.jit(JITTED[name]) if jitted else BALANCES[name]
    for spec in itertools.permutations(["x", "y", None], 2):
        if spec[0] == "x":
            continue  # two rows over four devices
        sharded = explicit(ids, *spec), explicit(loads, *spec)
        placed = jax.tree.map(lambda array: explicit(array, "y"), placement)
        got = run(*sharded, placed)
        assert_same(got, expected)
        for leaf in jax.tree.leaves(got):
            if leaf.shape == ids.shape:
                assert jax.typeof(leaf).sharding.spec == P(*spec)


@pytest.mark.parametrize("name", JITTED)
def test_explicit_axes_under_vmap(rng, explicit, name):
    """The mapped axis is sharded, too."""
    placement = PAIR.placement(rng)
    ids = np.stack([tokens(rng, PAIR, 40) for _ in range(4)])
    loads = np.stack([counts_of(row, PAIR.n_logical) for row in ids])
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 4), placement)
    run = jax.jit(jax.vmap(JITTED[name]))
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.tree.map(np.asarray, run(ids, loads, stacked))
    sharded = explicit(ids, "x", "y"), explicit(loads, "x", None, "y")
    assert_same(run(*sharded, jax.tree.map(lambda leaf: explicit(leaf, "x"), stacked)), expected)
