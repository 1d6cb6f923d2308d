"""Placements of any kind: the split is proven optimal, and exact to the token from the outputs."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import (
    SIZES,
    SMALL_SIZES,
    Sizes,
    can_improve,
    deal_slowly,
    loads_for,
    without_a_slot,
)
from cases import INT32_MAX, counts_of, spoiled
from jax.sharding import PartitionSpec
from meshes import n_compiled
from oracles import (
    assert_hosted,
    assert_positions,
    best_cut,
    optimum,
    proportional_keep,
    tokens_at_slots,
)
from steps import (
    assert_same,
    native_assign,
    native_rebalance,
    native_solve,
    problem_of,
    spec_assign,
    spec_rebalance,
    spec_solve,
)

from lplb_jax import (
    Placement,
    Split,
    Status,
    _native,
    assign,
    count_loads,
    metrics,
    place_experts,
    rebalance,
    solve,
    topologies,
    verify,
)


def placements(rng, sizes: Sizes, n: int, n_nodes: int = 1) -> Placement:
    """Random placements, stacked; in every eighth, one expert is everywhere."""
    tables = [
        sizes.phy2log_one_everywhere(rng) if i % 8 == 7 else sizes.phy2log(rng) for i in range(n)
    ]
    return Placement.from_phy2log(
        np.stack(tables).reshape(n, sizes.ep_size, -1),
        ep_size=sizes.ep_size,
        n_logical=sizes.n_logical,
        n_nodes=n_nodes,
    )


def layer(stacked, i: int):
    return jax.tree.map(lambda array: array[i], stacked)


def no_columns(placement: Placement) -> np.ndarray:
    return np.zeros((*placement.phy2log.shape[:-1], placement.ep_size, 0), np.int32)


def tokens(rng, sizes: Sizes, n_tokens: int) -> np.ndarray:
    """Ids `[ep_size, n_tokens]`, some −1, with other favourites on every rank."""
    weight = rng.lognormal(0, 1.5, (sizes.ep_size, sizes.n_logical))
    rows = [rng.choice(sizes.n_logical, n_tokens, p=row / row.sum()) for row in weight]
    return np.where(rng.random((sizes.ep_size, n_tokens)) < 0.1, -1, rows).astype(np.int32)


@pytest.mark.parametrize("name", SIZES)
def test_optimal(rng, name):
    """Against single augmenting paths in Python's integers, HiGHS, and all sets of few ranks."""
    sizes = SIZES[name]
    n = 10 if name == "128 x 40" else 60 if sizes.n_physical > 250 else 400
    stacked = placements(rng, sizes, n)
    hosts = [sizes.hosts(row) for row in stacked.phy2log]
    loads = np.stack([loads_for(rng, sizes, of) for of in hosts])
    splits = jax.jit(jax.vmap(lambda loads, of: solve(loads, placement=of)))(loads, stacked)
    splits = jax.tree.map(np.asarray, splits)
    for i in range(n):
        quota, phy2log = splits.quota[i].astype(np.int64), stacked.phy2log[i]
        assert (splits.max_load[i].shape, splits.status[i].tolist()) == ((1,), [0])
        assert (quota >= 0).all()
        assert not quota[phy2log < 0].any()
        served = np.zeros(sizes.n_logical, np.int64)
        np.add.at(served, phy2log[phy2log >= 0], quota[phy2log >= 0])
        np.testing.assert_array_equal(served, loads[i])
        assert metrics_of(quota, sizes).max() == splits.max_load[i] == splits.lower_bound[i]
        assert not can_improve(quota, phy2log, sizes)
        if i < 3:
            assert verify(loads[i], layer(splits, i), placement=layer(stacked, i)) == []
        if i < 20 and loads[i].sum() < 10**7:
            assert optimum(loads[i], hosts[i]) == splits.max_load[i]
        if i < 20 and sizes.ep_size <= 8:
            assert best_cut(loads[i], hosts[i]) == splits.max_load[i]


def metrics_of(quota: np.ndarray, sizes: Sizes) -> np.ndarray:
    return quota.reshape(sizes.ep_size, -1).sum(axis=1)


@pytest.mark.parametrize("name", ["33 x 3", "65 x 2", *SMALL_SIZES])
def test_solve_equals_the_specification(rng, name):
    """Bit for bit, including loads that overflow or are negative."""
    sizes = SIZES[name]
    n = 3 if sizes.ep_size > 32 else 40
    stacked = placements(rng, sizes, n)
    loads = np.zeros((n, sizes.ep_size, sizes.n_logical), np.int32)
    for i, row in enumerate(stacked.phy2log):
        source = rng.integers(0, sizes.ep_size, 2)
        loads[i, source[0]] = loads_for(rng, sizes, sizes.hosts(row))
        loads[i, source[1]] += rng.integers(0, 9, sizes.n_logical)
    loads[1::7] *= 3  # Some of them wrap around to negative loads, and others are too large.
    operands = (loads, no_columns(stacked), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))


@pytest.mark.parametrize("name", ["3 x 4", "8 x 6"])
def test_garbage_is_the_same_garbage_everywhere(rng, name):
    """Arbitrary tables, loads, counts and quotas: no crash, and slots that exist or −1."""
    sizes = SIZES[name]
    n = 40
    stacked = jax.tree.map(lambda x: spoiled(rng, x), placements(rng, sizes, n))
    loads = rng.integers(0, 200, (n, sizes.ep_size, sizes.n_logical)).astype(np.int32)
    loads[::3] = spoiled(rng, loads[::3])
    operands = (loads, no_columns(stacked), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))
    ids = rng.integers(-2, sizes.n_logical + 1, (n, sizes.ep_size, 31)).astype(np.int32)
    quota = rng.integers(-3, 40, stacked.phy2log.shape).astype(np.int32)
    quota[::3] = rng.integers(-(2**31), 2**31, quota[::3].shape)
    for proportional in (False, True):
        operands = (ids, loads, quota, stacked)
        assigned = native_assign(*operands, proportional=proportional)
        assert_same(assigned, spec_assign(*operands, proportional=proportional))
        assert assigned.physical_indices.min() >= -1
        assert assigned.physical_indices.max() < sizes.n_physical
    operands = (ids[:, 0], no_columns(stacked), stacked)
    assert_same(native_rebalance(*operands), spec_rebalance(*operands))


@pytest.mark.parametrize("name", [name for name in SIZES if SIZES[name].ep_size <= 64])
def test_every_slot_gets_its_quota_in_the_documented_order(rng, name):
    """Own rank first, then own node, then anywhere, as far as these quotas allow."""
    sizes = SIZES[name]
    n_nodes = int(rng.choice([v for v in range(1, sizes.ep_size + 1) if sizes.ep_size % v == 0]))
    node_size = sizes.ep_size // n_nodes
    placement = layer(placements(rng, sizes, 1, n_nodes), 0)
    ids = tokens(rng, sizes, 100)
    loads = counts_of(ids, sizes.n_logical)
    split = solve(loads, placement=placement)
    assigned = assign(ids, loads, split, placement=placement, positions=True)
    physical = np.asarray(assigned.physical_indices)
    assert_hosted(ids, physical, placement)
    assert_positions(*assigned)
    np.testing.assert_array_equal(tokens_at_slots(physical, sizes.n_physical), split.quota)
    quota = np.asarray(split.quota)
    own = near = 0
    rank = np.arange(sizes.n_physical) // sizes.slots_per_rank
    for e in range(sizes.n_logical):
        slots = np.sort(placement.log2phy[e, : placement.logcnt[e]])
        slots = slots[np.unique(rank[slots], return_index=True)[1]]
        dealt = deal_slowly(loads[:, e], quota[slots], rank[slots].tolist(), node_size)
        for source, hosts in enumerate(dealt):
            np.testing.assert_array_equal(physical[source][ids[source] == e], slots[hosts])
        at = np.zeros(sizes.ep_size, np.int64)
        at[rank[slots]] = quota[slots]
        own += np.minimum(loads[:, e], at).sum()
        of_node = [x.reshape(n_nodes, -1).sum(axis=1) for x in (loads[:, e], at)]
        near += np.minimum(*of_node).sum()
    source = np.arange(sizes.ep_size)[:, None]
    goes_to = np.where(physical >= 0, rank[physical], -sizes.ep_size)
    assert (goes_to == source).sum() == own
    assert (goes_to // node_size == source // node_size).sum() == near


@pytest.mark.parametrize("name", ["one rank", "5 x 7", "16 x 5"])
@pytest.mark.parametrize("proportional", [False, True])
def test_assign_equals_the_specification(rng, name, proportional):
    """Every rank's part as the ranks compute it themselves, also with arbitrary quotas."""
    sizes = SIZES[name]
    n_nodes = 2 if sizes.ep_size % 2 == 0 else 1
    stacked = placements(rng, sizes, 12, n_nodes)
    ids = np.stack([tokens(rng, sizes, 61) for _ in range(12)])
    loads = np.stack([counts_of(rows, sizes.n_logical) for rows in ids])
    quota = np.array(native_solve(loads, no_columns(stacked), stacked)[0])
    quota[::3] = rng.integers(0, 40, quota[::3].shape)
    operands = (ids, loads, quota, stacked)
    options = {"proportional": proportional, "positions": bool(rng.integers(2))}
    assert_same(native_assign(*operands, **options), spec_assign(*operands, **options))


def test_all_tokens_in_one_source(rng):
    """loads=None: the quotas in the order of the ranks, and the same in one call."""
    sizes = SIZES["8 x 6"]
    placement = layer(placements(rng, sizes, 1, n_nodes=2), 0)
    ids = tokens(rng, sizes, 700)[0]
    split = solve(count_loads(ids, sizes.n_logical), placement=placement)
    assigned = assign(ids, None, split, placement=placement, positions=True)
    for e in range(sizes.n_logical):
        slots = np.sort(placement.log2phy[e, : placement.logcnt[e]])
        expected = np.repeat(slots, np.asarray(split.quota)[slots])
        np.testing.assert_array_equal(assigned.physical_indices[ids == e], expected)
    assert_positions(*jax.tree.map(lambda x: x[None], assigned))
    both = rebalance(ids, None, placement=placement, positions=True)
    assert_same(both, (assigned, split))


def test_proportional_shares_are_exact(rng):
    """Against Python's integers: the share of a rank's first hosts, for all numbers of them."""
    sizes = SIZES["8 x 6"]
    stacked = placements(rng, sizes, 20)
    ids = np.stack([tokens(rng, sizes, 90) for _ in range(20)])
    loads = np.stack([counts_of(rows, sizes.n_logical) for rows in ids])
    quota = rng.integers(0, 10 ** rng.integers(1, 9), stacked.phy2log.shape).astype(np.int32)
    quota[rng.random(quota.shape) < 0.3] = 0
    assigned = native_assign(ids, loads, quota, stacked, proportional=True)
    physical = np.asarray(assigned.physical_indices)
    for i, source, e in np.ndindex(20, 8, sizes.n_logical):
        slots = np.flatnonzero(stacked.phy2log[i] == e)
        slots = slots[np.unique(slots // sizes.slots_per_rank, return_index=True)[1]]
        upto = np.cumsum(quota[i][slots], dtype=np.int64).tolist()
        count = int(loads[i, source, e])
        if upto[-1] == 0:
            expected = [stacked.log2phy[i][e, 0]] * count
        else:
            ends = [proportional_keep(count, q, upto[-1], source, 8) for q in upto]
            expected = np.repeat(slots, np.diff(ends, prepend=0)).tolist()
        assert physical[i, source][ids[i, source] == e].tolist() == expected


@pytest.mark.parametrize("kind", ["expert", "rank"])
def test_overflow(rng, kind):
    """Loads a rank might not be able to count: nothing is split, every expert stays at home."""
    sizes = SIZES["8 x 6"]
    placement = layer(placements(rng, sizes, 1), 0)
    loads = rng.integers(0, 1000, (2, sizes.n_logical))
    fullest = (loads.sum(axis=0) @ sizes.hosts(placement.phy2log)).argmax()
    hosted = np.flatnonzero(sizes.hosts(placement.phy2log)[:, fullest])
    if kind == "expert":
        loads[:, 5] = INT32_MAX // 2 + 1
    else:
        loads[0, hosted[0]] += INT32_MAX - loads.sum(axis=0)[hosted].sum()
    total = loads.sum(axis=0)
    sources = np.zeros((8, sizes.n_logical), np.int32)
    sources[:2] = loads
    if kind == "rank":  # The most that is possible.
        assert solve(sources, placement=placement).status.tolist() == [0]
        sources[1, hosted[-1]] += 1
        total[hosted[-1]] += 1
    split = solve(sources, placement=placement)
    assert split.status.tolist() == [Status.LOAD_OVERFLOW]
    assert (split.max_load.tolist(), split.lower_bound.tolist()) == ([INT32_MAX], [0])
    expected = metrics.home_quota(total.clip(None, INT32_MAX).astype(np.int32), placement)
    np.testing.assert_array_equal(split.quota, expected)


def test_status_bits(rng):
    sizes = SIZES["3 x 4"]
    placement = layer(placements(rng, sizes, 1), 0)
    loads = rng.integers(1, 9, sizes.n_logical).astype(np.int32)
    loads[2] = -7
    split = solve(loads, placement=placement)
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]
    assert_same(split.quota, solve(loads.clip(0), placement=placement).quota)
    ids = np.array([0, sizes.n_logical, -1], np.int32)
    assert rebalance(ids, None, placement=placement)[1].status.tolist() == [Status.INVALID_INDEX]


def traced_solve(table, loads, sizes):
    def made(table, loads):
        sizes_of = {"ep_size": sizes.ep_size, "n_logical": sizes.n_logical}
        placement = Placement.from_phy2log(table, **sizes_of)
        return placement, solve(loads, placement=placement)

    return jax.jit(made)(table, loads)


@pytest.mark.parametrize("wrong", ["none", "too large", "negative", "no slot"])
def test_traced_tables(rng, wrong):
    """As on the host; invalid values set a status bit."""
    sizes = SIZES["5 x 7"]
    table = sizes.phy2log(rng)
    loads = rng.integers(0, 9, sizes.n_logical).astype(np.int32)
    held = rng.choice(np.flatnonzero(table >= 0))
    if wrong == "none":
        options = {"ep_size": 5, "n_logical": sizes.n_logical}
        placement = Placement.from_phy2log(table, **options)
        expected = (placement, solve(loads, placement=placement))
        assert_same(traced_solve(table, loads, sizes), expected)
        tables = np.stack([table, sizes.phy2log(rng)]).reshape(2, 5, -1)
        stacked = jax.jit(lambda tables: Placement.from_phy2log(tables, **options))(tables)
        assert_same(stacked, Placement.from_phy2log(tables, **options))
        return
    if wrong == "no slot":
        table[table == table[held]] = -1
    else:
        table[held] = sizes.n_logical if wrong == "too large" else -2
    placement, split = traced_solve(table, loads, sizes)
    assert split.status.tolist() == [Status.BAD_PLACEMENT]
    assert int(placement.logcnt.sum()) == ((table >= 0) & (table < sizes.n_logical)).sum()


@pytest.mark.parametrize("name", ["3 x 4", "8 x 6", "33 x 3"])
def test_experts_without_a_slot(rng, name):
    """Their loads, of any value, set no other bit; native code and reference agree."""
    sizes, n = SIZES[name], 24
    tables, loads = without_a_slot(rng, sizes, n)
    hosted = np.stack([sizes.hosts(table) for table in tables])
    options = {"ep_size": sizes.ep_size, "n_logical": sizes.n_logical}
    stacked = jax.jit(lambda tables: Placement.from_phy2log(tables, **options))(
        tables.reshape(n, sizes.ep_size, -1)
    )
    split = native_solve(loads, no_columns(stacked), stacked)
    assert_same(split, spec_solve(loads, no_columns(stacked), stacked))
    quota, status = np.asarray(split[0]), np.asarray(split[3])[:, 0]
    for i in range(n):
        total = np.maximum(loads[i], 0).sum(axis=0, dtype=np.int64)
        anywhere = hosted[i].any(axis=1)
        most = (total[:, None] * hosted[i]).sum(axis=0).max()
        bits = Status(0) if anywhere.all() else Status.BAD_PLACEMENT
        if (loads[i] < 0)[:, anywhere].any():
            bits |= Status.NEGATIVE_LOAD
        if most > INT32_MAX:
            bits |= Status.LOAD_OVERFLOW
        assert status[i] == bits
        assert quota[i].sum(dtype=np.int64) == np.minimum(total, INT32_MAX)[anywhere].sum()

    indices = rng.integers(0, sizes.n_logical, (n, 200), np.int32)
    results = [f(indices, no_columns(stacked), stacked) for f in (native_rebalance, spec_rebalance)]
    assert_same(*results)
    slot = np.asarray(jax.tree.leaves(results[0])[0])
    unserved = ~np.take_along_axis(hosted.any(axis=2), indices, axis=1)
    np.testing.assert_array_equal(slot == -1, unserved)


def test_homes_are_even(rng):
    """Each rank is home of at most ⌈n_logical / ep_size⌉ experts, if the table allows it."""
    for sizes in SMALL_SIZES.values():
        # With the experts dealt to the ranks in turn there is such a choice.
        rank = rng.permutation(sizes.n_logical) % sizes.ep_size
        table = np.full((sizes.ep_size, sizes.slots_per_rank), -1)
        for r in range(sizes.ep_size):
            own = np.flatnonzero(rank == r)
            copies = rng.integers(-1, sizes.n_logical, sizes.slots_per_rank - len(own))
            table[r] = rng.permutation(np.concatenate([own, copies]))
        placement = Placement.from_phy2log(table, ep_size=sizes.ep_size, n_logical=sizes.n_logical)
        homes = placement.log2phy[:, 0]
        np.testing.assert_array_equal(table.ravel()[homes], np.arange(sizes.n_logical))
        count = np.bincount(homes // sizes.slots_per_rank)
        assert count.max() <= -(-sizes.n_logical // sizes.ep_size)


def test_tables_without_native_code(rng, monkeypatch):
    sizes = SIZES["3 x 4"]
    table = sizes.phy2log(rng)
    expected = Placement.from_phy2log(table, ep_size=3)
    monkeypatch.setattr(_native, "cpu", lambda: None)
    assert_same(Placement.from_phy2log(table, ep_size=3), expected)
    jax.jit(lambda: assert_same(Placement.from_phy2log(table, ep_size=3), expected))()


def test_shapes_of_tables(rng):
    sizes = SIZES["3 x 4"]
    options = {"ep_size": 3, "n_logical": sizes.n_logical}
    tables = np.stack([sizes.phy2log(rng) for _ in range(2)])
    flat = [Placement.from_phy2log(row, **options) for row in tables]
    assert_same(flat[0], Placement.from_phy2log(tables[0].reshape(3, 4).tolist(), **options))
    assert_same(flat[0], Placement.from_phy2log(jnp.asarray(tables[0]), **options))
    stacked = Placement.from_phy2log(tables.reshape(2, 3, 4).astype(np.int64), **options)
    assert_same(stacked, jax.tree.map(lambda *rows: np.stack(rows), *flat))
    assert_same(flat[0], Placement.from_phy2log(tables[0], ep_size=3))
    for placement in (flat[0], stacked):
        assert all(isinstance(array, np.ndarray) for array in jax.tree.leaves(placement))
        assert (placement.topology, placement.n_nodes) == (None, 1)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        ([[0, 1], [2, 3]], {"ep_size": 3}, ValueError, r"phy2log: .*ep_size = 3, got \[2, 2\]"),
        (np.zeros((4, 6), int), {"ep_size": 2}, ValueError, r"reshape .* \[layers, 2, -1\]"),
        ([0, 1, 2], {"ep_size": 2}, ValueError, "phy2log: expected shape"),
        ([[0.0, 1.0]], {"ep_size": 1}, TypeError, "phy2log: expected integers, got float64"),
        ([[0, 4], [1, -2]], {"ep_size": 2, "n_logical": 3}, ValueError, r"got 4 at \[0, 1\]"),
        ([[0, 2], [1, -2]], {"ep_size": 2, "n_logical": 3}, ValueError, r"got -2 at \[1, 1\]"),
        ([[0, 3], [1, -1]], {"ep_size": 2}, ValueError, "none for expert 2$"),
        ([[[0], [1]], [[1], [1]]], {"ep_size": 2}, ValueError, "none for expert 0 in layer 1"),
        ([[0, 1], [3, 4]], {"ep_size": 2}, ValueError, "phy2log: .*5 experts.* none for expert 2$"),
        ([[0, 1], [2, 1 << 40]], {"ep_size": 2}, ValueError, "phy2log: .*none for expert 3$"),
        ([[0, 1], [2]], {"ep_size": 2}, TypeError, "phy2log: expected .*rows of equal length"),
        ([[-1], [-1]], {"ep_size": 2}, ValueError, "phy2log: expected .* empty slots only"),
        ([[0], [1]], {"ep_size": 2, "n_logical": 3}, ValueError, "n_logical: expected 1 to"),
        ([[0], [1]], {"ep_size": 2, "n_logical": 2.0}, TypeError, "n_logical: expected an integer"),
        ([[0], [1]], {"ep_size": 2, "n_nodes": 3}, ValueError, "n_nodes: expected a divisor"),
    ],
)
def test_wrong_tables(table, options, error, message):
    with pytest.raises(error, match=message):
        Placement.from_phy2log(table, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("n_logical", [None, 5])
def test_empty_slots_of_unsigned_tables(rng, dtype, n_logical):
    """The largest value, as in indices."""
    table = rng.permutation(np.append(np.arange(5), [-1, -1, 2])).reshape(2, 4)
    found = Placement.from_phy2log(table.astype(dtype), ep_size=2, n_logical=n_logical)
    assert found == Placement.from_phy2log(table, ep_size=2)


@pytest.mark.parametrize("n_logical", [None, 256])
def test_as_many_experts_as_an_unsigned_type_has_values(rng, n_logical):
    table = rng.permutation(np.arange(256)).reshape(8, 32)
    found = Placement.from_phy2log(table.astype(np.uint8), ep_size=8, n_logical=n_logical)
    assert found == Placement.from_phy2log(table, ep_size=8)


def test_tables_by_layer_are_not_taken_for_ranks_silently(rng):
    """As many layers as ranks: rows with all experts, and copies that ranks would not need."""
    layers = np.stack([rng.permutation(np.append(np.arange(6), [3, 0])) for _ in range(4)])
    _native.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"phy2log: .*reshape\(4, 4, -1\)"):
        Placement.from_phy2log(layers, ep_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native.warn_once.cache_clear()
        stacked = Placement.from_phy2log(layers.reshape(4, 4, -1), ep_size=4)
        Placement.from_phy2log(layers.ravel(), ep_size=4)  # Explicitly by rank.
        Placement.from_phy2log(np.tile(np.arange(6), (2, 1)), ep_size=2)  # All experts everywhere.
        Placement.from_phy2log([[0, 1, 0, -1], [0, 1, 1, 0]], ep_size=2)
        # EPLB's own: no experts are left for the last slots.
        sizes: dict[str, Any] = {"n_logical": 2, "ep_size": 2, "n_physical": 8}
        place_experts(np.ones(2), **sizes, method="eplb")
    np.testing.assert_array_equal(stacked.phy2log, layers)


def test_wrong_placements(rng):
    """Made by hand: concrete values are checked."""
    placement = Placement.from_phy2log([[0, 1, 0], [0, 2, -1]], ep_size=2)
    loads = np.array([9, 1, 1], np.int32)
    swapped = placement.log2phy[:, [1, 0, 2, 3]]
    other_home = np.where(np.arange(3)[:, None] == 0, swapped, placement.log2phy)
    split = solve(loads, placement=Placement(placement.phy2log, other_home, placement.logcnt, 2))
    assert_same(split, solve(loads, placement=placement))
    wrong = {
        "phy2log": np.array([0, 1, 0, 0, 7, -1], np.int32),
        "log2phy": swapped,
        "logcnt": placement.logcnt + 1,
    }
    for name, value in wrong.items():
        arrays = {n: getattr(placement, n) for n in wrong} | {name: value}
        with pytest.raises(ValueError, match=r"(log2phy|phy2log): expected"):
            solve(loads, placement=Placement(**arrays, ep_size=2))
        bad = jax.jit(lambda placement: solve(loads, placement=placement))
        status = bad(Placement(**arrays, ep_size=2)).status.tolist()
        assert status == [0 if name == "logcnt" else Status.BAD_PLACEMENT]


def test_new_placements_need_no_compilation(rng):
    sizes = SIZES["8 x 6"]
    stacked = placements(rng, sizes, 5)
    ids = tokens(rng, sizes, 50)[0]
    route = jax.jit(lambda ids, placement: rebalance(ids, None, placement=placement))
    for i in range(5):
        physical, split = route(ids, layer(stacked, i))
        assert_same((physical, split), rebalance(ids, None, placement=layer(stacked, i)))
    assert n_compiled(route) == 1


def test_scan_and_vmap_take_a_placement_per_layer(rng):
    sizes = SIZES["16 x 5"]
    stacked = placements(rng, sizes, 4, n_nodes=4)
    ids = np.stack([tokens(rng, sizes, 40) for _ in range(4)])
    loads = np.stack([counts_of(rows, sizes.n_logical) for rows in ids])

    def one(ids, loads, placement):
        return rebalance(ids, loads, placement=placement, positions=True)

    expected = [one(ids[i], loads[i], layer(stacked, i)) for i in range(4)]
    expected = jax.tree.map(lambda *rows: np.stack(rows), *expected)
    assert_same(jax.jit(jax.vmap(one))(ids, loads, stacked), expected)

    def step(carry, of_layer):
        return carry, one(*of_layer)

    assert_same(jax.jit(lambda *x: jax.lax.scan(step, 0, x)[1])(ids, loads, stacked), expected)
    grad = jax.grad(lambda x: (x * one(ids[0], loads[0], layer(stacked, 0))[1].max_load[0]).sum())
    assert grad(jnp.ones(3)).tolist() == [expected[1].max_load[0, 0]] * 3


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("given", ["none", "counts", "estimates"])
def test_under_shard_map(rng, cpu_devices, check_vma, given):
    """Every rank finds its own tokens' slots alone; together they fill the quotas."""
    sizes = SIZES["8 x 6"]
    placement = layer(placements(rng, sizes, 1, n_nodes=2), 0)
    ids = tokens(rng, sizes, 64)
    counts = counts_of(ids, sizes.n_logical)
    loads = {"none": None, "counts": counts, "estimates": counts.sum(axis=0, dtype=np.int32)}[given]
    mesh = jax.sharding.Mesh(cpu_devices, ("ep",))

    def route(ids, loads, placement):
        physical, split = rebalance(ids, loads, placement=placement, axis_name="ep")
        return physical, split._replace(status=split.status[None])

    axes = PartitionSpec("ep")
    results = (axes, Split(PartitionSpec(), PartitionSpec(), PartitionSpec(), axes))
    mapped = jax.shard_map(
        route,
        mesh=mesh,
        in_specs=(axes, PartitionSpec(), PartitionSpec()),
        out_specs=results,
        check_vma=check_vma,
    )
    physical, split = jax.jit(mapped)(ids, loads, placement)
    assert not split.status.any()
    assert_hosted(ids, physical, placement)
    expected = solve(counts, placement=placement)
    assert_same(split.quota, expected.quota)
    if given != "estimates":
        np.testing.assert_array_equal(tokens_at_slots(physical, sizes.n_physical), split.quota)
        assert_same(physical, assign(ids, counts, split, placement=placement))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "uint16"])
def test_index_types(rng, dtype):
    sizes = SIZES["8 x 6"]
    placement = layer(placements(rng, sizes, 1, n_nodes=2), 0)
    ids = tokens(rng, sizes, 50)
    loads = counts_of(ids, sizes.n_logical)
    expected = rebalance(ids, loads, placement=placement, positions=True)
    with jax.enable_x64(dtype == "int64"):
        got = rebalance(ids.astype(dtype), loads, placement=placement, positions=True)
    assert_same(got, expected)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_modes(rng, x64, promotion):
    """The same bits in all of JAX's modes, also by the specification."""
    sizes = SIZES["3 x 4"]
    placement = layer(placements(rng, sizes, 1, n_nodes=3), 0)
    ids = tokens(rng, sizes, 50)
    loads = counts_of(ids, sizes.n_logical)
    expected = rebalance(ids, loads, placement=placement, positions=True)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        options = {"ep_size": 3, "n_logical": sizes.n_logical, "n_nodes": 3}
        assert_same(Placement.from_phy2log(placement.phy2log, **options), placement)
        traced = jax.jit(lambda table: Placement.from_phy2log(table, **options))
        assert_same(traced(placement.phy2log), placement)
        assert_same(rebalance(ids, loads, placement=placement, positions=True), expected)
        one = jax.tree.map(lambda x: x[None], (loads, no_columns(placement), placement))
        assert_same([x[0] for x in spec_solve(*one)], expected[1])
        one = jax.tree.map(lambda x: x[None], (ids, loads, expected[1].quota, placement))
        assert_same([x[0] for x in spec_assign(*one, proportional=False)], expected[0])


def test_along_a_topology_nothing_changes(rng):
    """A placement that carries its topology is solved along it; its table alone as any other."""
    cube = topologies.cube()
    sizes: dict[str, Any] = {"n_logical": 32, "ep_size": 8, "redundants_per_rank": 2}
    placement = place_experts(rng.random(32), cube, **sizes)
    loads = rng.integers(0, 999, 32).astype(np.int32)
    assert_same(solve(loads, placement=placement), solve(loads, cube, placement=placement))
    anywhere = Placement.from_phy2log(placement.phy2log, ep_size=8)
    assert problem_of(anywhere).node_size == 8
    assert_same(
        solve(loads, placement=anywhere).max_load, solve(loads, placement=placement).max_load
    )


def test_figures(rng):
    sizes = SIZES["3 x 4"]
    placement = layer(placements(rng, sizes, 1), 0)
    loads = rng.integers(0, 99, sizes.n_logical).astype(np.int32)
    home = np.asarray(metrics.home_quota(loads, placement))
    assert int(metrics.tokens_moved(home, placement)) == 0
    np.testing.assert_array_equal(home[placement.log2phy[:, 0]], loads)
    even = np.asarray(metrics.even_quota(loads, placement))
    assert int(metrics.tokens_moved(even, placement)) == even.sum() - sum(
        even[placement.log2phy[:, 0]]
    )
    for e in range(sizes.n_logical):
        share = even[placement.phy2log == e]
        assert share.sum() == loads[e]
        assert share.max() - share.min() <= 1
