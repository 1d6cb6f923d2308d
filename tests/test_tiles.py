"""Tiles and base loads: proven against integer programs, and the specification's bits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import SIZES
from cases import CASES, INT32_MAX, counts_of, spoiled
from jax.sharding import PartitionSpec
from oracles import tokens_at_slots
from steps import assert_same, on_cpu
from tile_oracles import fewest_tiles, fewest_tokens, tiles_of

from lplb_jax import (
    Placement,
    Split,
    Status,
    TileSplit,
    assign,
    metrics,
    moe,
    place_experts,
    rebalance,
    reference,
    solve,
    topologies,
    verify,
)
from lplb_jax._problem import Costs, Problem
from lplb_jax.solver import solve_checked

ANY = ["one rank", "no room", "2 x 3", "3 x 4", "5 x 7", "8 x 6", "16 x 5"]
ALONG = ["one rank", "ring 8", "ring 4, two groups", "cube, three combined", "random 5x3"]


def some_loads(rng, n_logical: int, tile: int) -> np.ndarray:
    """Loads from less than a tile to many tiles."""
    mean = np.log(tile * rng.choice([0.3, 1, 4, 20]) + 1)
    loads = rng.lognormal(mean, rng.choice([0.3, 1, 2]), n_logical)
    return (loads * (rng.random(n_logical) < 0.9)).astype(np.int32)


def some_base(rng, ep_size: int) -> np.ndarray:
    return (rng.integers(0, 5, ep_size) * rng.integers(0, 4)).astype(np.int32)


def any_placements(rng, name: str, n: int) -> Placement:
    sizes = SIZES[name]
    tables = [
        (sizes.phy2log if rng.random() < 0.7 else sizes.phy2log_one_everywhere)(rng)
        for _ in range(n)
    ]
    return Placement.from_phy2log(
        np.stack(tables).reshape(n, sizes.ep_size, -1),
        ep_size=sizes.ep_size,
        n_logical=sizes.n_logical,
    )


def assert_best(loads, base, tile, split, table) -> None:
    """One group: feasible, the fewest tiles, and the fewest tokens with the tiles of every slot."""
    quota = np.asarray(split.quota).reshape(table.shape).astype(np.int64)
    assert (quota >= 0).all()
    assert not quota[table < 0].any()
    served = np.zeros(len(loads), np.int64)
    np.add.at(served, table[table >= 0], quota[table >= 0])
    np.testing.assert_array_equal(served, loads)
    tiles = tiles_of(quota, tile).sum(axis=1) + base
    assert (tiles.max(), split.status) == (split.max_load, 0)
    assert split.max_load == split.lower_bound == fewest_tiles(loads, table, base, tile)
    tokens = (quota.sum(axis=1) + base * tile).max()
    assert split.max_tokens == tokens == fewest_tokens(quota, base * tile, table, tile)


@pytest.mark.parametrize("name", ANY)
def test_of_any_placement(rng, name):
    n, tile = 15, int(rng.choice([1, 2, 7, 64, 128]))
    stacked = any_placements(rng, name, n)
    loads = np.stack([some_loads(rng, stacked.n_logical, tile) for _ in range(n)])
    base = np.stack([some_base(rng, stacked.ep_size) for _ in range(n)])

    def one(loads, placement, base):
        return solve(loads, placement=placement, tile=tile, base_load=base)

    splits = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(loads, stacked, base))
    for i in range(n):
        split = TileSplit(splits.quota[i], *(field[i, 0] for field in splits[1:]))
        table = stacked.phy2log[i].reshape(stacked.ep_size, -1)
        assert_best(loads[i], base[i], tile, split, table)


@pytest.mark.parametrize("name", ALONG)
def test_along_a_topology(rng, name):
    n, tile = 15, int(rng.choice([1, 2, 7, 64, 128]))
    case = CASES[name](rng)
    placements = [case.placement(rng) for _ in range(n)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *placements)
    loads = np.stack([some_loads(rng, case.n_logical, tile) for _ in range(n)])
    base = np.stack([some_base(rng, case.ep_size) for _ in range(n)])

    def one(loads, placement, base):
        return solve(loads, case.r2o, placement=placement, tile=tile, base_load=base)

    splits = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(loads, stacked, base))
    groups = (case.n_groups, len(case.r2o))
    for i, g in np.ndindex(n, case.n_groups):
        table = stacked.phy2log[i].reshape(*groups, -1)[g]
        quota = splits.quota[i].reshape(*groups, -1)[g]
        split = TileSplit(quota, *(field[i, g] for field in splits[1:]))
        of_group = np.isin(np.arange(case.n_logical), table)
        mine = np.where(of_group, loads[i], 0)
        assert_best(mine, base[i].reshape(groups)[g], tile, split, table)


def native(tile, loads, r2o, placement, base):
    costs = Costs(tile, base)
    return solve_checked(loads, Problem(r2o, placement), costs=costs)


def specified(tile, loads, r2o, placement, base):
    operands = (loads, placement.phy2log, placement.log2phy, r2o, base)
    return reference.solve_costs(*operands, ep_size=placement.ep_size, tile=tile)


@pytest.mark.parametrize(
    "name", ["8 x 6", "8 x 40", "33 x 3", "cube, three combined", "ring 4, two groups"]
)
def test_the_specifications_bits(rng, name):
    """With loads and base loads that overflow or are negative, and with invalid tables."""
    n, tile = 24, int(rng.choice([2, 5, 128, 1 << 20]))
    if name in SIZES:
        stacked = any_placements(rng, name, n)
        r2o = np.zeros((n, stacked.ep_size, 0), np.int32)
    else:
        case = CASES[name](rng)
        stacked = [case.placement(rng) for _ in range(n)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *stacked)
        r2o = np.repeat(np.asarray(case.r2o)[None], n, axis=0)
    shape = (n, stacked.ep_size, stacked.n_logical)
    mean = np.log(min(tile, 128) * rng.choice([0.3, 1, 4, 20], (n, 1, 1)) / stacked.ep_size)
    loads = rng.lognormal(mean, rng.choice([0.3, 1, 2], (n, 1, 1)), shape).astype(np.int32)
    base = rng.integers(0, 50, shape[:2]).astype(np.int32)
    loads[1::4], base[2::4] = spoiled(rng, loads[1::4]), spoiled(rng, base[2::4])
    loads[3], base[3] = 0, INT32_MAX // tile // 2
    stacked = jax.tree.map(lambda x: np.concatenate([x[:-2], spoiled(rng, x[-2:])]), stacked)

    def both(function):
        return jax.jit(jax.vmap(lambda *operands: function(tile, *operands)))

    operands = (loads, r2o, stacked, base)
    found = both(native)(*operands)
    assert_same(found, on_cpu(both(specified))(*operands))


def test_any_load_in_any_tiles(rng):
    """Up to the largest of both, and next to whole tiles."""
    placement = Placement.from_phy2log([[0]], ep_size=1)
    for tile in [1, 3, 127, 1 << 20, *(2 ** rng.uniform(0, 20, 4)).astype(int).tolist()]:
        some = 2 ** rng.uniform(0, 31, 100)
        whole = tile * rng.integers(0, INT32_MAX // tile + 1, 100)[:, None] + [-1, 0, 1]
        loads = np.concatenate([some, whole.ravel(), INT32_MAX - np.arange(5)])
        loads = loads.clip(0, INT32_MAX).astype(np.int32)
        found = jax.vmap(lambda load, tile=tile: solve(load, placement=placement, tile=tile))(
            jnp.asarray(loads)[:, None]
        )
        assert not found.status.any()
        np.testing.assert_array_equal(found.max_load[:, 0], -(-loads.astype(np.int64) // tile))
        np.testing.assert_array_equal(found.max_tokens[:, 0], loads)
        np.testing.assert_array_equal(found.quota[:, 0], loads)


@pytest.mark.parametrize("along", [True, False])
def test_tiles_of_one_row_are_tokens(rng, along):
    """The plan without tiles, bit for bit; no base load equals one of zeros."""
    case = CASES["cube, three combined"](rng)
    placement = case.placement(rng)
    if not along:
        tables = placement.phy2log.reshape(case.ep_size, -1)
        placement = Placement.from_phy2log(tables, ep_size=case.ep_size)
    loads = rng.integers(0, 1000, case.n_logical).astype(np.int32)
    plain = solve(loads, placement=placement)
    assert_same(solve(loads, placement=placement, tile=1), (*plain, plain.max_load))
    nothing = np.zeros(case.ep_size, np.int32)
    assert_same(solve(loads, placement=placement, base_load=nothing), plain)


@pytest.mark.parametrize(("along", "dtype"), [(True, "float32"), (False, "int32")])
def test_base_loads_of_ranks_that_differ(rng, along, dtype):
    """Also with weights, a base load acts like another expert that cannot leave its rank."""
    case = CASES["ring 8"](rng)
    placement = case.placement(rng)
    tables = placement.phy2log.reshape(case.ep_size, -1)
    if not along:
        placement = Placement.from_phy2log(tables, ep_size=case.ep_size)
    loads = rng.lognormal(5, 1, case.n_logical).astype(dtype)
    base = rng.integers(0, 400, case.ep_size).astype(np.int32)
    weights = rng.uniform(0.5, 2, case.ep_size).astype(np.float32)
    extra = np.arange(case.ep_size)[:, None] + case.n_logical
    other = Placement.from_phy2log(np.concatenate([tables, extra], axis=1), ep_size=case.ep_size)
    both = jnp.asarray(np.concatenate([loads, base.astype(dtype)]))
    found = solve(jnp.asarray(loads), placement=placement, base_load=base, rank_weights=weights)
    expected = solve(both, placement=other, rank_weights=weights)
    assert found.status.tolist() == expected.status.tolist() == [0]
    np.testing.assert_allclose(found.max_load, expected.max_load, rtol=2e-4)
    load = np.asarray(found.quota).reshape(case.ep_size, -1).sum(axis=1) + base
    largest = (load / weights * weights.mean(dtype=np.float64)).max()
    np.testing.assert_allclose(found.max_load, largest, rtol=1e-5)
    assert found.lower_bound <= found.max_load


def test_tokens_arrive_by_the_tiles(rng):
    """rebalance and assign, alone and in shard_map, without and with nodes."""
    cube = topologies.cube()
    placement = place_experts(None, cube, n_logical=32, ep_size=8, redundants_per_rank=2)
    weight = rng.lognormal(0, 1, 32)
    ids = rng.choice(32, (8, 50), p=weight / weight.sum()).astype(np.int32)
    loads, base = counts_of(ids, 32), some_base(rng, 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("ep",)) if _eight() else None
    options: dict[str, Any] = {"placement": placement, "tile": 8, "base_load": base}
    split = solve(loads, **options)
    tiles = metrics.rank_loads(tiles_of(split.quota, 8), 8) + base
    assert tiles.max() == split.max_load
    assert verify(loads, split, placement=placement, tile=8, base_load=base) == []
    quota = np.roll(split.quota, 1)
    assert verify(loads, split._replace(quota=quota), placement=placement, tile=8)
    for n_nodes in (None, 2):
        physical, found = rebalance(ids, loads, n_nodes=n_nodes, **options)
        assert_same(found, split)
        np.testing.assert_array_equal(tokens_at_slots(physical, 48), split.quota)
        assert_same(assign(ids, loads, split, placement=placement, n_nodes=n_nodes), physical)
        if mesh is None:
            continue
        axes, same = PartitionSpec("ep"), PartitionSpec()

        def route(ids, n_nodes=n_nodes):
            return rebalance(ids, None, axis_name="ep", n_nodes=n_nodes, **options)

        out = (axes, TileSplit(*[same] * 5))
        route = jax.jit(jax.shard_map(route, mesh=mesh, in_specs=axes, out_specs=out))
        assert_same(route(ids), (physical, split))
    _, alone = rebalance(ids.ravel(), None, **options)
    assert_same(alone, split)


@pytest.mark.parametrize("n_nodes", [None, 2])
@pytest.mark.parametrize(("tile", "has_base"), [(8, False), (16, True), (None, True)])
def test_at_once_as_step_by_step(rng, tile, has_base, n_nodes):
    """The native call, and the specification's."""
    placement = jax.tree.map(lambda array: array[0], any_placements(rng, "8 x 6", 1))
    ids = rng.integers(-1, placement.n_logical, 90).astype(np.int32)
    ids[rng.random(90) < 0.3] = 2
    loads = np.bincount(ids[ids >= 0], minlength=placement.n_logical).astype(np.int32)
    base = some_base(rng, 8) if has_base else None
    costs: dict[str, Any] = {"placement": placement, "tile": tile, "base_load": base}
    split = solve(loads, **costs)
    step = functools.partial(rebalance, n_nodes=n_nodes, positions=True, **costs)
    assignment, found = step(ids, None)
    assert type(found) is type(split)
    assert_same(found, split)
    wanted = assign(ids, None, split, placement=placement, n_nodes=n_nodes, positions=True)
    assert_same(assignment, wanted)
    sizes = {"ep_size": 8, "node_size": 8 // (n_nodes or 1), "positions": 1, "tile": tile or 1}
    specified = jax.jit(functools.partial(reference.rebalance_costs, **sizes))
    tables = placement.phy2log, placement.log2phy, np.zeros((8, 0), np.int32)
    results = on_cpu(specified)(ids, *tables, np.zeros(8, np.int32) if base is None else base)
    assert_same(results[: 3 + len(split)], (*assignment, *split))


def _eight() -> bool:
    return len(jax.devices()) >= 8


@pytest.mark.parametrize("per_slot", [3.9, 4.1])
def test_auto_counts_tiles_where_slots_have_few(per_slot):
    """By the number of tokens, which is known at trace time."""
    ring = topologies.ring(2)
    placement = place_experts(None, ring, n_logical=4, ep_size=2, redundants_per_rank=1)
    ids = jnp.zeros(int(per_slot * 128 * 6), jnp.int32)
    _, split = jax.eval_shape(
        lambda ids: rebalance(ids, None, placement=placement, tile="auto"), ids
    )
    assert type(split) is (Split if per_slot > 4 else TileSplit)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tile": 0}, ValueError, "tile: expected a static integer from 1 .*got 0"),
        ({"tile": 2.0}, ValueError, "tile: .*got 2.0"),
        ({"tile": True}, ValueError, "tile: .*got True"),
        ({"tile": (1 << 20) + 1}, ValueError, "tile: expected a static integer"),
        ({"tile": "auto"}, ValueError, "tile: expected a number of rows .*got 'auto'"),
        ({"tile": 8, "solver": "ipm"}, ValueError, "tile: expected None .*interior point.*got 8"),
        ({"tile": 8, "rank_weights": [1, 2]}, ValueError, "tile: expected None"),
        ({"base_load": [0, 1]}, TypeError, "base_load: expected an int32 array, got list"),
        ({"base_load": np.zeros(2)}, TypeError, "base_load: .*got float64"),
        ({"base_load": np.zeros(3, np.int32)}, ValueError, r"base_load: .*\[2\], got \[3\]"),
    ],
)
def test_messages(options, error, words):
    with pytest.raises(error, match=words):
        solve(np.ones(4, np.int32), topologies.ring(2), **options)


def test_negative_base_loads_count_as_none():
    loads, ring = np.array([9, 1, 1, 1], np.int32), topologies.ring(2)
    split = solve(loads, ring, base_load=np.array([-7, 0], np.int32))
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]
    assert_same(split[:3], solve(loads, ring)[:3])


def test_in_a_layer(rng, cpu_devices):
    """moe_layer routes by tiles, and computes the same output."""
    ring = topologies.ring(2)
    placement = place_experts(None, ring, n_logical=4, ep_size=2, redundants_per_rank=1)
    mesh = jax.sharding.Mesh(cpu_devices[:2], ("ep",))
    axes, same = PartitionSpec("ep"), PartitionSpec()
    tokens = rng.normal(size=(60, 3)).astype(np.float32)
    ids = rng.choice(4, (60, 1), p=[0.7, 0.1, 0.1, 0.1]).astype(np.int32)
    shapes = (4, 3, 4), (4, 2, 3)
    experts = moe.Experts(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    base = np.array([1, 0], np.int32)

    def out_of(**options):
        def layer(tokens, ids, gates, experts):
            options_of_all = {"placement": placement, "axis_name": "ep", "capacity_factor": 2.0}
            return moe.moe_layer(tokens, ids, gates, experts, **options_of_all, **options)

        results = moe.LayerResult(axes, same)
        layer = jax.shard_map(layer, mesh=mesh, in_specs=axes, out_specs=results)
        return jax.jit(layer)(tokens, ids, np.ones((60, 1), np.float32), experts)

    out, traffic = out_of(tile=8, base_load=base, n_nodes=2)
    np.testing.assert_allclose(out, out_of().out, rtol=1e-4, atol=1e-5)
    loads = np.bincount(ids.ravel(), minlength=4).astype(np.int32)
    split = solve(loads, placement=placement, tile=8, base_load=base)
    np.testing.assert_array_equal(traffic.slot_loads, split.quota)
    np.testing.assert_array_equal(traffic.lower_bound, split.lower_bound)
