"""rebalance: all ways to pass loads, equality with its steps, and input at its limits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, INT32_MAX, SMALL_CASES, Case, counts_of, tokens
from oracles import (
    assert_feasible,
    assert_hosted,
    assert_optimal,
    assert_positions,
    assign_slowly,
    proportional_keep,
    tokens_at_slots,
)
from steps import assert_same, native_rebalance, repeated, spec_rebalance

from lplb_jax import (
    Assignment,
    Split,
    Status,
    assign,
    count_loads,
    place_experts,
    rebalance,
    solve,
    topologies,
)

NAMES = ["one rank", "cube", "torus 2x3, all replicated", *SMALL_CASES]


@pytest.mark.parametrize("name", NAMES)
def test_counted_from_the_indices(rng, name):
    """loads=None on one device: optimal, and exact to the token from the outputs alone."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 400).reshape(-1, 8)
    physical, split = rebalance(ids, None, case.r2o, placement=placement)
    loads = counts_of(ids.reshape(1, -1), case.n_logical)[0]
    assert physical.shape == ids.shape
    assert_hosted(ids, physical, placement)
    assert_feasible(loads, split, case, placement)
    assert_optimal(loads, split, case, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
    flat = ids.reshape(1, -1)
    np.testing.assert_array_equal(
        np.asarray(physical).reshape(1, -1), assign_slowly(flat, split.quota, case, placement)
    )


@pytest.mark.parametrize("name", NAMES)
def test_given_counts_of_all_sources(rng, name):
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 90)
    loads = counts_of(ids, case.n_logical)
    physical, split = rebalance(ids, loads, case.r2o, placement=placement)
    assert_hosted(ids, physical, placement)
    assert_feasible(loads.sum(axis=0), split, case, placement)
    assert_optimal(loads.sum(axis=0), split, case, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
    np.testing.assert_array_equal(physical, assign_slowly(ids, split.quota, case, placement))


@pytest.mark.parametrize("name", NAMES)
def test_given_statistics(rng, name):
    """loads [n_logical]: the plan is the statistics'; this source, rank 0, keeps its share."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    statistics = rng.integers(0, 10_000, case.n_logical).astype(np.int32)
    statistics *= rng.random(case.n_logical) < 0.8
    ids = tokens(rng, case, 500)[0]
    physical, split = rebalance(ids, statistics, case.r2o, placement=placement)
    assert_same(split, solve(statistics, case.r2o, placement=placement))
    assert_hosted(ids, physical, placement)
    own = counts_of(ids[None], case.n_logical)[0]
    at_slot = tokens_at_slots(physical, placement.n_physical)
    for expert, (home, replica) in enumerate(placement.log2phy):
        stay, load = int(split.quota[home]), int(statistics[expert])
        count = int(own[expert])
        if replica < 0:
            assert at_slot[home] == count
        else:
            keep = proportional_keep(count, stay, load, 0, case.ep_size)
            assert (at_slot[home], at_slot[replica]) == (keep, count - keep)


@pytest.mark.parametrize("name", ["one rank", "ring 4, two groups", "cube, three combined"])
def test_positions(rng, name):
    """In every mode the same slots, and the place of every token in its slot's list."""
    case = CASES[name](rng)
    options: dict[str, Any] = {"placement": case.placement(rng)}
    ids = tokens(rng, case, 80)
    loads = counts_of(ids, case.n_logical)
    for given in (None, loads, loads.sum(axis=0, dtype=np.int32)):
        physical, split = rebalance(ids, given, case.r2o, **options)
        assigned, same = rebalance(ids, given, case.r2o, positions=True, **options)
        assert isinstance(assigned, Assignment)
        assert_same((assigned.physical_indices, same), (physical, split))
        rows = assigned if given is loads else jax.tree.map(jnp.ravel, assigned)
        assert_positions(*rows)
        if given is None:
            assert_same(assigned.counts, split.quota)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16"])
def test_alone_equals_its_specification(rng, dtype):
    positions = bool(rng.integers(2))
    case = Case(topologies.torus(2, 3), 6, combined=2)
    with jax.enable_x64(dtype == "int64"):
        ids = np.stack([tokens(rng, case, 250)[0] for _ in range(3)]).astype(dtype)
        placements = [case.placement(rng) for _ in ids]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *placements)
        operands = (ids, repeated(case.r2o, 3), stacked)
        results = native_rebalance(*operands, positions=positions)
        assert_same(results, spec_rebalance(*operands, positions=positions))


def test_default_placement(rng):
    """The given order, one redundant slot per column, two groups from the rows of loads."""
    case = Case(topologies.cube(), 4, n_groups=2)
    ids = tokens(rng, case, 100)
    loads = counts_of(ids, case.n_logical)
    assert_same(
        rebalance(ids, loads, case.r2o),
        rebalance(ids, loads, case.r2o, placement=case.placement()),
    )


@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_is_its_steps_composed(rng, solver):
    case = Case(topologies.torus(2, 3), 4)
    placement = case.placement(rng)
    options: dict[str, Any] = {"placement": placement}
    ids = tokens(rng, case, 200)
    physical, split = rebalance(ids, None, case.r2o, solver=solver, **options)
    assert_same(split, solve(count_loads(ids, 24), case.r2o, solver=solver, **options))
    assert_same(physical, assign(ids, None, split, case.r2o, **options))

    loads = counts_of(ids, 24)
    physical, split = rebalance(ids, loads, case.r2o, solver=solver, **options)
    assert_same(split, solve(loads, case.r2o, **options))
    assert_same(physical, assign(ids, loads, split, case.r2o, **options))

    physical, split = rebalance(ids, loads[0], case.r2o, **options)
    assert_same(split, solve(loads[0], case.r2o, **options))
    assert_same(physical, assign(ids, loads[0], split, case.r2o, **options))


def test_split_is_a_named_tuple_of_int32():
    placement = Case(topologies.ring(2), 1).placement()
    physical, split = rebalance([0, 1, 1], None, topologies.ring(2), placement=placement)
    assert isinstance(split, Split)
    assert split._fields == ("quota", "max_load", "lower_bound", "status")
    assert {array.dtype for array in (physical, *split)} == {np.dtype(np.int32)}
    assert [array.shape for array in split] == [(4,), (1,), (1,), (1,)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16"])
@pytest.mark.parametrize("x64", [False, True])
def test_index_types(rng, dtype, x64):
    case = Case(topologies.cube(), 32)
    placement = case.placement(rng)
    ids = tokens(rng, case, 100, absent=0 if dtype == "uint8" else 0.1)
    expected = rebalance(ids, None, case.r2o, placement=placement)
    with jax.enable_x64(x64):
        got = rebalance(ids.astype(dtype), None, case.r2o, placement=placement)
    assert_same(got, expected)


def test_lists_are_accepted():
    placement = Case(topologies.ring(2), 1).placement()
    physical, _ = rebalance([[0, 0], [-1, 0]], None, [[1], [0]], placement=placement)
    assert physical.tolist() == [[0, 0], [-1, 3]]  # of three tokens one goes to the copy


@pytest.mark.parametrize(
    ("bad", "dtype", "status"),
    [
        (-1, np.int32, 0),
        (16, np.int32, Status.INVALID_INDEX),
        (-2, np.int32, Status.INVALID_INDEX),
        (2**31 - 1, np.int32, Status.INVALID_INDEX),
        (-(2**31), np.int32, Status.INVALID_INDEX),
        (2**32, np.int64, Status.INVALID_INDEX),
        (255, np.uint8, 0),
        (254, np.uint8, Status.INVALID_INDEX),
        (65535, np.uint16, 0),
        (255, np.uint16, Status.INVALID_INDEX),
    ],
)
@pytest.mark.parametrize("mode", ["counted", "by source", "statistics"])
def test_out_of_range_ids_behave_as_absent_and_set_a_bit(rng, bad, dtype, status, mode):
    case = Case(topologies.ring(2), 4, n_groups=2)
    placement = case.placement(rng)
    clean = tokens(rng, case, 50, absent=0.2)
    loads = counts_of(clean, 16)
    loads = {"counted": None, "by source": loads, "statistics": loads[0]}[mode]
    expected, split = rebalance(clean, loads, case.r2o, placement=placement)
    assert split.status.tolist() == [0, 0]
    dirty = np.where(clean < 0, np.array(bad, dtype), clean.astype(dtype))
    physical, dirty_split = rebalance(dirty, loads, case.r2o, placement=placement)
    assert_same(physical, expected)
    assert_same(dirty_split[:3], split[:3])
    assert dirty_split.status.tolist() == [status] * 2


def test_zero_loads():
    case = Case(topologies.cube(), 4, n_groups=2)
    for ids in (np.full((16, 5), -1, np.int32), np.zeros((16, 0), np.int32)):
        physical, split = rebalance(ids, None, case.r2o, placement=case.placement())
        assert physical.shape == ids.shape
        assert (np.asarray(physical) == -1).all()
        for array in split:
            assert not np.asarray(array).any()


def test_one_expert_with_everything(rng):
    """At most half goes to its copy; without a copy all stays, and the bound says so."""
    case = Case(topologies.ring(4), 2)
    placement = case.placement()
    for expert, best in [(2, 501), (3, 1001)]:
        ids = np.full(1001, expert, np.int32)
        physical, split = rebalance(ids, None, case.r2o, placement=placement)
        assert split.max_load.tolist() == split.lower_bound.tolist() == [best]
        assert_hosted(ids, physical, placement)


def test_empty_ranks_are_filled(rng):
    case = Case(topologies.ring(4), 2)
    placement = case.placement(rng)
    own = placement.phy2log.reshape(4, 3)[[0, 2], :2].ravel()
    ids = rng.choice(own, 1000).astype(np.int32)
    _, split = rebalance(ids, None, case.r2o, placement=placement)
    assert_optimal(counts_of(ids[None], 8)[0], split, case, placement)
    assert (np.asarray(split.quota).reshape(4, 3).sum(axis=1)[[1, 3]] > 0).all()


def test_totals_above_two_to_the_31(rng):
    """Statistics that no batch has; the first tokens still go where the plan says."""
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    loads = (INT32_MAX // 6 - rng.integers(0, 10**8, 32)).astype(np.int32)
    assert loads.sum(dtype=np.int64) > 2**32
    ids = tokens(rng, case, 100)[0]
    physical, split = rebalance(ids, loads, case.r2o, placement=placement)
    assert_optimal(loads, split, case, placement)
    assert_hosted(ids, physical, placement)


def test_negative_loads_count_as_zero(rng):
    case = Case(topologies.ring(2), 2)
    ids = tokens(rng, case, 20)
    loads = counts_of(ids, 4)
    loads[0, 1] = -3
    physical, split = rebalance(ids, loads, case.r2o)
    expected, clean = rebalance(ids, loads.clip(0), case.r2o)
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]
    assert_same(physical, expected)
    assert_same(split[:3], clean[:3])


def test_bits_add_up(rng):
    loads = np.array([INT32_MAX, INT32_MAX, -1, 0], np.int32)
    _, split = rebalance(np.array([9]), loads, topologies.ring(2))
    assert split.status.tolist() == [
        Status.INVALID_INDEX | Status.NEGATIVE_LOAD | Status.LOAD_OVERFLOW
    ]


def test_overflow_sends_every_token_home(rng):
    loads = np.array([INT32_MAX, INT32_MAX, 0, 0], np.int32)
    ids = rng.integers(0, 4, 50).astype(np.int32)
    placement = Case(topologies.ring(2), 2).placement()
    physical, split = rebalance(ids, loads, topologies.ring(2), placement=placement)
    assert split.status.tolist() == [Status.LOAD_OVERFLOW]
    known = np.isin(ids, [0, 1])
    np.testing.assert_array_equal(np.asarray(physical)[known], placement.log2phy[ids[known], 0])


def test_more_columns_of_log2phy_are_accepted(rng):
    """Shapes do not assume two copies per expert: padding with −1 changes nothing."""
    case = Case(topologies.cube(), 4)
    narrow = case.placement(rng)
    padding = np.full((32, 3), -1, np.int32)
    wide = type(narrow)(
        phy2log=narrow.phy2log,
        log2phy=np.concatenate([narrow.log2phy, padding], axis=1),
        logcnt=narrow.logcnt,
        ep_size=8,
    )
    ids = tokens(rng, case, 100)
    loads = counts_of(ids, 32)
    assert_same(
        rebalance(ids, loads, case.r2o, placement=wide),
        rebalance(ids, loads, case.r2o, placement=narrow),
    )


def test_device_arrays_and_numpy_give_the_same(rng):
    case = Case(topologies.cube(), 4)
    ids = tokens(rng, case, 50)
    loads = counts_of(ids, 32)
    placement = case.placement(rng)
    on_device = jax.tree.map(jnp.asarray, placement)
    assert_same(
        rebalance(jnp.asarray(ids), jnp.asarray(loads), case.r2o, placement=on_device),
        rebalance(ids, loads, case.r2o, placement=placement),
    )


def test_never_worse_than_before(rng):
    """A placement from yesterday's loads, a batch of today's."""
    history = rng.lognormal(3, 1, 64)
    placement = place_experts(
        history, topologies.cube(), n_logical=64, ep_size=8, redundants_per_rank=2
    )
    weight = history * rng.lognormal(0, 0.5, 64)
    ids = rng.choice(64, 20_000, p=weight / weight.sum()).astype(np.int32)
    _, split = rebalance(ids, None, topologies.cube(), placement=placement)
    home = np.bincount(placement.log2phy[ids, 0] // 10, minlength=8)
    assert split.max_load[0] < home.max()
