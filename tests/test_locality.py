"""n_nodes along a topology: tokens stay on their rank and node as far as the quotas allow."""

from typing import Any

import jax
import numpy as np
import pytest
from any_cases import deal_slowly
from cases import CASES, SMALL_CASES, counts_of
from jax.sharding import PartitionSpec
from oracles import assert_hosted, assert_positions, tokens_at_slots
from steps import assert_same

from lplb_jax import Split, assign, count_loads, rebalance, solve


def tokens(rng, case, n: int) -> np.ndarray:
    """Ids `[ep_size, n]`, some −1, with other favourites on every rank."""
    weight = rng.lognormal(0, 1.5, (case.ep_size, case.n_logical))
    ids = [rng.choice(case.n_logical, n, p=row / row.sum()) for row in weight]
    return np.where(rng.random((case.ep_size, n)) < 0.1, -1, ids).astype(np.int32)


def some_nodes(rng, ep_size: int) -> int:
    return int(rng.choice([v for v in range(1, ep_size + 1) if ep_size % v == 0]))


@pytest.mark.parametrize("name", ["one rank", "torus 4x4", *SMALL_CASES])
def test_own_rank_then_own_node_then_the_rest(rng, name):
    """Token by token, as many as these quotas let stay; the quotas are unchanged."""
    case = CASES[name](rng)
    placement, n_nodes = case.placement(rng), some_nodes(rng, case.ep_size)
    node_size, slots_per_rank = (
        case.ep_size // n_nodes,
        placement.n_physical // case.ep_size,
    )
    ids = tokens(rng, case, 90)
    loads = counts_of(ids, case.n_logical)
    split = solve(loads, case.r2o, placement=placement)
    options: dict[str, Any] = {"placement": placement, "positions": True, "n_nodes": n_nodes}
    assigned = assign(ids, loads, split, case.r2o, **options)
    assert_same(rebalance(ids, loads, case.r2o, **options), (assigned, split))
    physical, quota = np.asarray(assigned.physical_indices), np.asarray(split.quota)
    assert_hosted(ids, physical, placement)
    assert_positions(*assigned)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), quota)
    for e in range(case.n_logical):
        slots = np.flatnonzero(placement.phy2log == e)
        slots = slots[np.unique(slots // slots_per_rank, return_index=True)[1]]
        ranks = (slots // slots_per_rank).tolist()
        dealt = deal_slowly(loads[:, e], quota[slots], ranks, node_size)
        for source, hosts in enumerate(dealt):
            np.testing.assert_array_equal(physical[source][ids[source] == e], slots[hosts])


def test_more_stay_than_with_home_ranks_first(rng):
    case = CASES["torus 4x4"](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 500)
    loads = counts_of(ids, case.n_logical)
    node = np.arange(16) // 4

    def on_own_node(**options):
        physical, _ = rebalance(ids, loads, case.r2o, placement=placement, **options)
        physical = np.asarray(physical)
        rank = np.where(physical < 0, 0, physical * 16 // placement.n_physical)
        return ((node[rank] == node[:, None]) & (physical >= 0)).sum()

    assert on_own_node(n_nodes=4) > on_own_node()


def test_inside_shard_map_and_without_other_ranks(rng, cpu_devices):
    """Ranks on their own assign the same as one call for all of them."""
    case = CASES["cube, three combined"](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 40)
    mesh = jax.sharding.Mesh(cpu_devices, ("ep",))
    axes, same = PartitionSpec("ep"), PartitionSpec()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=axes, out_specs=(axes, Split(*[same] * 4)))
    def route(ids):
        options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "n_nodes": 2}
        return rebalance(ids, None, case.r2o, **options)

    loads = counts_of(ids, case.n_logical)
    expected = rebalance(ids, loads, case.r2o, placement=placement, n_nodes=2)
    assert_same(route(ids), expected)
    alone = rebalance(ids[0], None, case.r2o, placement=placement, n_nodes=2)
    split = solve(count_loads(ids[0], case.n_logical), case.r2o, placement=placement)
    np.testing.assert_array_equal(
        tokens_at_slots(alone[0], placement.n_physical), np.asarray(split.quota)
    )
    assert_same(alone[1], split)


def test_nodes_that_ranks_do_not_fill(rng):
    case = CASES["cube"](rng)
    ids = tokens(rng, case, 4)
    loads = counts_of(ids, case.n_logical)
    for n_nodes, error in ((3, ValueError), (0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="n_nodes: expected"):
            rebalance(ids, loads, case.r2o, n_nodes=n_nodes)
        with pytest.raises(error, match="n_nodes: expected"):
            assign(ids, loads, solve(loads, case.r2o), case.r2o, n_nodes=n_nodes)
