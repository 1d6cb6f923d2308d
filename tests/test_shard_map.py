"""Inside shard_map over virtual devices, against the global view of the same tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, counts_of, tokens
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracles import (
    assert_hosted,
    assert_optimal,
    assert_positions,
    proportional_keep,
    tokens_at_slots,
)
from steps import assert_same

from lplb_jax import assign, count_loads, rebalance, solve, sync_loads, topologies

VMA = pytest.mark.parametrize("check_vma", [True, False])
CASES_OF_EIGHT = {
    "cube": Case(topologies.cube(), 8),
    "two groups": Case(topologies.ring(4), 6, n_groups=2, combined=2),
    "four groups": Case(topologies.ring(2), 4, n_groups=4),
}


def expert_parallel(function, mesh, *, axes: Any = "ep", out_specs, check_vma=True, n_inputs=1):
    """jit of shard_map with the ranks along the leading axis of every input."""
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(P(axes),) * n_inputs,
            out_specs=out_specs,
            check_vma=check_vma,
        )
    )


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices, "ep")


@VMA
@pytest.mark.parametrize("name", CASES_OF_EIGHT)
def test_equals_the_global_view(rng, mesh, name, check_vma):
    """Each rank sees only its tokens; the Split is known to be equal on all ranks: P()."""
    case = CASES_OF_EIGHT[name]
    placement = case.placement(rng)
    ids = tokens(rng, case, 120)
    run = expert_parallel(
        lambda ids: rebalance(ids, None, case.r2o, placement=placement, axis_name="ep"),
        mesh,
        out_specs=(P("ep"), P()),
        check_vma=check_vma,
    )
    physical, split = run(ids)
    loads = counts_of(ids, case.n_logical)
    assert_same((physical, split), rebalance(ids, loads, case.r2o, placement=placement))
    assert_hosted(ids, physical, placement)
    assert_optimal(loads.sum(axis=0), split, case, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)


@VMA
def test_every_rank_has_the_same_split(rng, mesh, check_vma):
    """Bit for bit, though each solves on its own."""
    case = CASES_OF_EIGHT["cube"]
    placement = case.placement(rng)

    def rank(ids):
        _, split = rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")
        return jax.tree.map(lambda array: array[None], split)

    splits = expert_parallel(rank, mesh, out_specs=P("ep"), check_vma=check_vma)(
        tokens(rng, case, 50)
    )
    for array in splits:
        np.testing.assert_array_equal(array, np.repeat(array[:1], 8, axis=0))


def test_physical_indices_are_not_replicated(rng, mesh):
    """A wrong out_specs is found at trace time: the varying axes come through the native calls."""
    case = CASES_OF_EIGHT["cube"]
    run = expert_parallel(
        lambda ids: rebalance(ids, None, case.r2o, placement=case.placement(), axis_name="ep"),
        mesh,
        out_specs=(P(), P()),
    )
    with pytest.raises(ValueError, match="out_specs"):
        run(tokens(rng, case, 10))


def test_a_split_of_unsynced_loads_is_not_replicated(rng, mesh):
    case = CASES_OF_EIGHT["cube"]
    run = expert_parallel(
        lambda ids: (
            solve(count_loads(ids, case.n_logical), case.r2o, placement=case.placement()).quota
        ),
        mesh,
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="out_specs"):
        run(tokens(rng, case, 10))


@VMA
def test_given_counts(rng, mesh, check_vma):
    """All ranks already have the counts: nothing is gathered, and the result is the same."""
    case = CASES_OF_EIGHT["two groups"]
    placement = case.placement(rng)
    ids = tokens(rng, case, 80)
    loads = counts_of(ids, case.n_logical)
    run = expert_parallel(
        lambda ids: rebalance(ids, loads, case.r2o, placement=placement, axis_name="ep")[0],
        mesh,
        out_specs=P("ep"),
        check_vma=check_vma,
    )
    assert "all-gather" not in run.lower(ids).as_text().replace("_", "-")
    assert_same(run(ids), rebalance(ids, loads, case.r2o, placement=placement)[0])


@VMA
def test_given_statistics(rng, mesh, check_vma):
    """Each source keeps its share, rounded with its own offset."""
    case = CASES_OF_EIGHT["cube"]
    placement = case.placement(rng)
    ids = tokens(rng, case, 200)
    statistics = rng.integers(0, 1000, case.n_logical).astype(np.int32)
    run = expert_parallel(
        lambda ids: rebalance(ids, statistics, case.r2o, placement=placement, axis_name="ep")[0],
        mesh,
        out_specs=P("ep"),
        check_vma=check_vma,
    )
    physical = run(ids)
    assert_hosted(ids, physical, placement)
    quota = np.asarray(solve(statistics, case.r2o, placement=placement).quota)
    own = counts_of(ids, case.n_logical)
    for rank in range(8):
        at_slot = tokens_at_slots(physical[rank], placement.n_physical)
        for expert in np.flatnonzero(placement.log2phy[:, 1] >= 0):
            home = placement.log2phy[expert, 0]
            counts = int(own[rank, expert]), int(quota[home]), int(statistics[expert])
            assert at_slot[home] == proportional_keep(*counts, rank, 8)


@VMA
def test_positions(rng, mesh, check_vma):
    """Each rank's own lists, in the order of its tokens."""
    case = CASES_OF_EIGHT["two groups"]
    options = {"placement": case.placement(rng), "axis_name": "ep", "positions": True}

    def rank(ids):
        assigned, split = rebalance(ids, None, case.r2o, **options)
        return assigned._replace(counts=assigned.counts[None]), split

    ids = tokens(rng, case, 70)
    run = expert_parallel(rank, mesh, out_specs=(P("ep"), P()), check_vma=check_vma)
    assigned, split = run(ids)
    assert_positions(*assigned)
    np.testing.assert_array_equal(assigned.counts.sum(axis=0), split.quota)


@VMA
def test_steps_one_by_one(rng, mesh, check_vma):
    case = CASES_OF_EIGHT["four groups"]
    placement = case.placement(rng)

    def rank(ids):
        gathered = sync_loads(count_loads(ids, case.n_logical), "ep")
        split = solve(gathered, case.r2o, placement=placement)
        physical = assign(ids, gathered, split, case.r2o, placement=placement, axis_name="ep")
        return physical, split, gathered

    ids = tokens(rng, case, 70)
    run = expert_parallel(rank, mesh, out_specs=(P("ep"), P(), P()), check_vma=check_vma)
    physical, split, gathered = run(ids)
    loads = counts_of(ids, case.n_logical)
    assert_same(gathered, loads)
    assert_same((physical, split), rebalance(ids, loads, case.r2o, placement=placement))


@VMA
@pytest.mark.parametrize("group", [2, 4])
def test_sub_axis_of_a_mesh(rng, cpu_devices, group, check_vma):
    """data 2 × ep 4: two independent batches, here with one group of four or two of two ranks."""
    mesh = Mesh(cpu_devices.reshape(2, 4), ("data", "ep"))
    case = Case(topologies.ring(group), 6, n_groups=4 // group)
    placement = case.placement(rng)
    ids = np.stack([tokens(rng, case, 60) for _ in range(2)])

    def rank(ids):
        physical, split = rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")
        return physical, jax.tree.map(lambda array: array[None], split)

    run = expert_parallel(
        rank,
        mesh,
        axes=("data", "ep"),
        out_specs=(P(("data", "ep")), P("data")),
        check_vma=check_vma,
    )
    physical, splits = run(ids.reshape(8, 60))
    for i, batch in enumerate(ids):
        loads = counts_of(batch, case.n_logical)
        expected = rebalance(batch, loads, case.r2o, placement=placement)
        split = jax.tree.map(lambda array, i=i: array[i], splits)
        assert_same((physical.reshape(2, 4, 60)[i], split), expected)


@VMA
def test_tuple_of_axes(rng, cpu_devices, check_vma):
    """Ranks are numbered with the last axis fastest, as in P(("node", "gpu"))."""
    mesh = Mesh(cpu_devices.reshape(2, 4), ("node", "gpu"))
    case = CASES_OF_EIGHT["cube"]
    placement = case.placement(rng)
    axes = ("node", "gpu")
    ids = tokens(rng, case, 60)
    run = expert_parallel(
        lambda ids: rebalance(ids, None, case.r2o, placement=placement, axis_name=axes),
        mesh,
        axes=axes,
        out_specs=(P(axes), P()),
        check_vma=check_vma,
    )
    loads = counts_of(ids, case.n_logical)
    assert_same(run(ids), rebalance(ids, loads, case.r2o, placement=placement))


@VMA
def test_scan_over_layers_inside(rng, mesh, check_vma):
    """New tokens and a new placement for each layer, in one compiled loop."""
    case = CASES_OF_EIGHT["cube"]
    placements = [case.placement(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *placements)
    ids = np.stack([tokens(rng, case, 40) for _ in range(3)], axis=1)

    def rank(ids):
        def layer(_, inputs):
            ids, placement = inputs
            return None, rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")

        physical, splits = jax.lax.scan(layer, None, (ids[0], stacked))[1]
        return physical[None], splits

    run = expert_parallel(rank, mesh, out_specs=(P("ep"), P()), check_vma=check_vma)
    physical, splits = run(ids)
    for i, placement in enumerate(placements):
        batch = ids[:, i]
        loads = counts_of(batch, case.n_logical)
        split = jax.tree.map(lambda array, i=i: array[i], splits)
        assert_same((physical[:, i], split), rebalance(batch, loads, case.r2o, placement=placement))


@VMA
def test_vmap_over_layers_inside(rng, mesh, check_vma):
    case = CASES_OF_EIGHT["two groups"]
    placement = case.placement(rng)
    ids = np.stack([tokens(rng, case, 40) for _ in range(3)], axis=1)

    def balance(ids):
        return rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")

    run = expert_parallel(
        lambda ids: jax.vmap(balance, in_axes=1, out_axes=(1, 0))(ids),
        mesh,
        out_specs=(P("ep"), P()),
        check_vma=check_vma,
    )
    physical, splits = run(ids)
    for i in range(3):
        loads = counts_of(ids[:, i], case.n_logical)
        split = jax.tree.map(lambda array, i=i: array[i], splits)
        expected = rebalance(ids[:, i], loads, case.r2o, placement=placement)
        assert_same((physical[:, i], split), expected)


@VMA
def test_gradient_through_a_sharded_layer(rng, mesh, check_vma):
    case = CASES_OF_EIGHT["cube"]
    placement = case.placement(rng)
    scale = jnp.arange(1.0, 1 + case.n_logical)

    def rank(logits):
        weight, choice = jax.lax.top_k(jax.nn.softmax(logits), 2)
        physical, _ = rebalance(choice, None, case.r2o, placement=placement, axis_name="ep")
        return weight * scale[jnp.asarray(placement.phy2log)[physical]]

    def plain(logits):
        weight, choice = jax.lax.top_k(jax.nn.softmax(logits), 2)
        return weight * scale[choice]

    run = expert_parallel(rank, mesh, out_specs=P("ep"), check_vma=check_vma)
    logits = rng.normal(0, 1, (8 * 16, case.n_logical)).astype(np.float32)
    slope = jax.grad(lambda logits: run(logits).sum())(logits)
    with jax.default_device(mesh.devices[0]):
        expected = jax.grad(lambda logits: plain(logits).sum())(logits)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_placement_as_an_argument(rng, mesh):
    """Replicated over the mesh, changed without a new trace."""
    case = CASES_OF_EIGHT["cube"]
    traces = []

    def rank(ids, placement):
        traces.append(1)
        return rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")

    run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(P("ep"), P()), out_specs=(P("ep"), P())))
    ids = tokens(rng, case, 40)
    loads = counts_of(ids, case.n_logical)
    for _ in range(3):
        placement = case.placement(rng)
        assert_same(run(ids, placement), rebalance(ids, loads, case.r2o, placement=placement))
    assert len(traces) == 1


def test_placements_on_the_mesh_are_traced_once(rng, mesh):
    """Like NumPy arrays. Alternating both retraces, since JAX sees two types."""
    case = CASES_OF_EIGHT["cube"]
    traces = []

    @jax.jit
    def run(ids, placement):
        traces.append(1)
        return rebalance(ids, None, case.r2o, placement=placement)

    whole = jax.sharding.NamedSharding(mesh, P())
    ids = jax.device_put(tokens(rng, case, 40), whole)
    for _ in range(3):
        placement = case.placement(rng)
        expected = rebalance(np.asarray(ids), None, case.r2o, placement=placement)
        assert_same(run(ids, jax.device_put(placement, whole)), expected)
    assert len(traces) == 1


def test_an_invalid_id_of_one_rank_is_known_to_all(rng, mesh):
    case = CASES_OF_EIGHT["four groups"]
    ids = tokens(rng, case, 20)
    ids[rng.integers(8), 3] = case.n_logical
    run = expert_parallel(
        lambda ids: (
            rebalance(ids, None, case.r2o, placement=case.placement(), axis_name="ep")[1].status
        ),
        mesh,
        out_specs=P(),
    )
    assert run(ids).tolist() == [1, 1, 1, 1]


def test_a_mesh_with_explicit_axes(rng, cpu_devices):
    case = CASES_OF_EIGHT["cube"]
    placement = case.placement(rng)
    mesh = jax.make_mesh(
        (8,), ("ep",), (jax.sharding.AxisType.Explicit,), devices=cpu_devices.tolist()
    )
    ids = tokens(rng, case, 30)
    run = expert_parallel(
        lambda ids: rebalance(ids, None, case.r2o, placement=placement, axis_name="ep"),
        mesh,
        out_specs=(P("ep"), P()),
    )
    loads = counts_of(ids, case.n_logical)
    sharded = jax.device_put(ids, jax.sharding.NamedSharding(mesh, P("ep")))
    assert_same(run(sharded), rebalance(ids, loads, case.r2o, placement=placement))
