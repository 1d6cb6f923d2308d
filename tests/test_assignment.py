"""assign: exact to the token, in the documented order, judged by the outputs alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, INT32_MAX, SMALL_CASES, Case, counts_of, spoiled, tokens
from oracles import (
    assert_hosted,
    assert_positions,
    assign_slowly,
    proportional_keep,
    tokens_at_slots,
)
from steps import assert_same, native_assign, repeated, spec_assign

from lplb_jax import (
    Assignment,
    Split,
    Status,
    assign,
    count_loads,
    rebalance,
    solve,
    topologies,
)


@pytest.mark.parametrize("name", CASES)
def test_every_slot_gets_its_quota_in_the_documented_order(rng, name):
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 150)
    loads = counts_of(ids, case.n_logical)
    split = solve(loads, case.r2o, placement=placement)
    physical = np.asarray(assign(ids, loads, split, case.r2o, placement=placement))
    assert physical.dtype == np.int32
    assert_hosted(ids, physical, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
    np.testing.assert_array_equal(physical, assign_slowly(ids, split.quota, case, placement))


@pytest.mark.parametrize("name", SMALL_CASES)
def test_all_tokens_in_one_source(rng, name):
    """loads=None: the first `quota[home]` tokens of an expert, in their order, stay."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 500)[:1]
    split = solve(counts_of(ids, case.n_logical)[0], case.r2o, placement=placement)
    physical = np.asarray(assign(ids, None, split, case.r2o, placement=placement))
    np.testing.assert_array_equal(physical, assign_slowly(ids, split.quota, case, placement))


@pytest.mark.parametrize("name", ["one rank", "cube", "random 16x8", "random 33x1", *SMALL_CASES])
@pytest.mark.parametrize("proportional", [False, True])
def test_equals_the_specification(rng, name, proportional):
    """Every rank's part as the ranks compute it themselves, also with arbitrary quotas."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 61)
    loads = counts_of(ids, case.n_logical)
    fitting = solve(loads, case.r2o, placement=placement).quota
    other = rng.integers(0, 40, (3, placement.n_physical))
    quota = np.concatenate([fitting[None], other]).astype(np.int32)
    operands = (*repeated((ids, loads), 4), quota, repeated(placement, 4))
    options: dict[str, Any] = {"proportional": proportional, "positions": bool(rng.integers(2))}
    assert_same(native_assign(*operands, **options), spec_assign(*operands, **options))


@pytest.mark.parametrize("kind", ["all here", "by source", "estimates"])
def test_no_token_goes_to_another_experts_slot(rng, kind):
    """Also with a traced placement: then the tokens get no slot, and the status says so."""
    case = Case(topologies.ring(4), 3, n_groups=2)
    placement = case.placement(rng)
    ids = tokens(rng, case, 100)
    counts = counts_of(ids, case.n_logical)
    loads = {
        "all here": None,
        "by source": counts,
        "estimates": counts.sum(axis=0, dtype=np.int32),
    }[kind]

    @jax.jit
    def balance(log2phy):
        traced = dataclasses.replace(placement, log2phy=log2phy)
        return rebalance(ids, loads, case.r2o, placement=traced)

    for _ in range(5):
        log2phy = placement.log2phy.copy()
        expert, other = rng.permutation(case.n_logical)[:2]
        log2phy[expert, rng.integers(2)] = log2phy[other, 0]
        physical, split = balance(log2phy)
        assert (split.status == Status.BAD_PLACEMENT).any()
        slot = np.asarray(physical)
        assert (placement.phy2log[slot] == ids)[slot >= 0].all()
        others = (ids >= 0) & (ids < case.n_logical) & (ids != expert)
        assert (slot >= 0)[others].all()


def test_quotas_of_no_solver(rng):
    """Negative quotas count as 0, and sums beyond int32 do not wrap."""
    case = Case(topologies.ring(4), 2)
    placements = repeated(case.placement(rng), 20)
    ids = repeated(tokens(rng, case, 60), 20)
    counts = repeated(counts_of(ids[0], case.n_logical), 20)
    kinds = [-(2**31), -5, 0, 3, 2**30, INT32_MAX - 1, INT32_MAX]
    quota = rng.choice(kinds, placements.phy2log.shape).astype(np.int32)
    for proportional in (False, True):
        operands = (ids, counts, quota, placements)
        assigned = native_assign(*operands, proportional=proportional)
        assert_same(assigned, spec_assign(*operands, proportional=proportional))
        clipped = native_assign(ids, counts, quota.clip(0), placements, proportional=proportional)
        assert_same(assigned, clipped)


@pytest.mark.parametrize("proportional", [False, True])
def test_garbage_is_the_same_garbage_everywhere(rng, proportional):
    """Arbitrary placements and counts: no crash, and slots that exist or −1."""
    case = CASES["random 5x3"](rng)
    placements = jax.tree.map(lambda x: spoiled(rng, x), repeated(case.placement(rng), 20))
    ids = repeated(tokens(rng, case, 40), 20)
    counts = spoiled(rng, repeated(counts_of(ids[0], case.n_logical), 20))
    quota = rng.integers(0, 40, placements.phy2log.shape).astype(np.int32)
    operands = (ids, counts, quota, placements)
    assigned = native_assign(*operands, proportional=proportional)
    assert_same(assigned, spec_assign(*operands, proportional=proportional))
    assert assigned.physical_indices.min() >= -1
    assert assigned.physical_indices.max() < placements.n_physical


@pytest.mark.parametrize("name", ["one rank", "cube", *SMALL_CASES])
def test_positions(rng, name):
    """A token's place in its slot's list, and the lists' lengths; the slots stay the same."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = tokens(rng, case, 120)
    loads = counts_of(ids, case.n_logical)
    split = solve(loads, case.r2o, placement=placement)
    total = loads.sum(axis=0, dtype=np.int32)
    for mine, given in [(ids[0], None), (ids[0], total), (ids, loads)]:
        physical = assign(mine, given, split, case.r2o, placement=placement)
        assigned = assign(mine, given, split, case.r2o, placement=placement, positions=True)
        assert isinstance(assigned, Assignment)
        assert_same(assigned.physical_indices, physical)
        assert_positions(*assigned)
        assert assigned.position.shape == mine.shape
        several = [len(ids)] if mine is ids else []
        assert assigned.counts.shape == (*several, placement.n_physical)


def test_positions_keep_the_shape(rng):
    case = Case(topologies.ring(2), 3)
    ids = tokens(rng, case, 24)[0]
    split = solve(count_loads(ids, 6), case.r2o)
    options: dict[str, Any] = {"placement": case.placement(), "positions": True}
    folded = assign(ids.reshape(4, 3, 2), None, split, case.r2o, **options)
    flat = assign(ids, None, split, case.r2o, **options)
    assert_same(jax.tree.map(jnp.ravel, folded), flat)


def test_positions_sort_into_expert_order(rng):
    """Their purpose: with the lists' starts, a scatter sorts tokens by slot."""
    case = Case(topologies.cube(), 8)
    ids = tokens(rng, case, 200, absent=0)[0]
    split = solve(count_loads(ids, 64), case.r2o)
    options: dict[str, Any] = {"placement": case.placement(), "positions": True}
    physical, position, counts = assign(ids, None, split, case.r2o, **options)
    start = np.cumsum(counts) - counts
    row = np.empty(200, int)
    row[start[physical] + position] = np.arange(200)
    np.testing.assert_array_equal(row, np.argsort(physical, stable=True))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16"])
def test_index_types(rng, dtype):
    """The same ids in another type go to the same slots; the largest unsigned one is no expert."""
    case = Case(topologies.cube(), 8)
    ids = tokens(rng, case, 100)
    loads = counts_of(ids, 64)
    split = solve(loads, case.r2o)
    expected = assign(ids, loads, split, case.r2o)
    with jax.enable_x64(dtype == "int64"):
        assert_same(assign(ids.astype(dtype), loads, split, case.r2o), expected)


def test_256_experts_in_uint8(rng):
    case = Case(topologies.cube(), 32)
    ids = tokens(rng, case, 300, absent=0)
    ids[:, :5] = 255
    loads = counts_of(ids, 256)
    split = solve(loads, case.r2o)
    physical = assign(ids.astype(np.uint8), loads, split, case.r2o)
    assert_same(physical, assign(ids, loads, split, case.r2o))
    np.testing.assert_array_equal(tokens_at_slots(physical, len(split.quota)), split.quota)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 3), (), (1,), (3, 5, 2)])
def test_any_shape(rng, shape):
    case = Case(topologies.ring(2), 3)
    ids = rng.integers(-1, 6, shape).astype(np.int32)
    split = solve(count_loads(ids, 6), case.r2o)
    physical = assign(ids, None, split, case.r2o, placement=case.placement())
    assert physical.shape == shape
    np.testing.assert_array_equal(tokens_at_slots(physical, len(split.quota)), split.quota)


def test_sources_may_have_any_trailing_shape(rng):
    case = Case(topologies.ring(4), 3)
    ids = tokens(rng, case, 24)
    loads = counts_of(ids, 12)
    split = solve(loads, case.r2o)
    folded = assign(ids.reshape(4, 3, 4, 2), loads, split, case.r2o)
    assert_same(folded.reshape(4, 24), assign(ids, loads, split, case.r2o))


def test_invalid_ids_get_no_slot(rng):
    case = Case(topologies.ring(2), 2)
    ids = np.array([0, 4, -2, 2**31 - 1, -(2**31), 3, -1], np.int32)
    split = solve(count_loads(ids, 4), case.r2o)
    physical = assign(ids, None, split, case.r2o, placement=case.placement())
    np.testing.assert_array_equal(np.asarray(physical) >= 0, [1, 0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("value", [2**32 + 1, -(2**32) + 1])
def test_wide_ids_do_not_wrap_around(value):
    case = Case(topologies.ring(2), 2)
    ids = np.array([value, 0])
    split = solve(count_loads(ids, 4), case.r2o)
    physical = assign(ids, None, split, case.r2o, placement=case.placement())
    assert physical.tolist()[0] == -1


@pytest.mark.parametrize("kind", ["small", "large"])
def test_proportional_share_is_exact(rng, kind):
    """Against Python's integers, for quotas up to 2³¹ − 1."""
    case = Case(topologies.cube(), 8)
    most = 6 if kind == "small" else INT32_MAX
    placement = case.placement(rng)
    quota = rng.integers(0, most, placement.n_physical, endpoint=True)
    home, replica = placement.log2phy.T
    load = np.where(replica >= 0, quota[home] + quota[replica], quota[home])
    # The quotas of an expert sum to its load, and that is an int32.
    quota[replica[replica >= 0]] -= (load - INT32_MAX).clip(0)[replica >= 0]
    ids = tokens(rng, case, 400)
    own = counts_of(ids, 64)
    operands = repeated((ids, own, quota.astype(np.int32), placement), 1)
    physical = np.asarray(native_assign(*operands, proportional=True).physical_indices)[0]
    for rank in range(8):
        at_home = np.bincount(ids[rank][physical[rank] == home[ids[rank]]], minlength=64)
        for e in np.flatnonzero(replica >= 0):
            stay, away = int(quota[home[e]]), int(quota[replica[e]])
            keep = proportional_keep(int(own[rank, e]), stay, stay + away, rank, 8)
            assert at_home[e] == keep, (rank, e)


def test_proportional_share_of_large_counts(rng):
    """Counts near 2³¹ without the tokens: only the arithmetic matters."""
    placement = Case(topologies.ring(2), 1).placement()
    stay = rng.integers(0, INT32_MAX, 200, endpoint=True)
    away = rng.integers(0, INT32_MAX - stay, endpoint=True)
    quota = np.stack([stay, 0 * stay, 0 * stay, away], axis=1).astype(np.int32)
    count = rng.integers(0, INT32_MAX, (200, 2, 1), endpoint=True)
    counts = np.concatenate([count, 0 * count], axis=2).astype(np.int32)
    # The one token of each source tells whether its share is zero.
    operands = (np.zeros((200, 2, 1), np.int32), counts, quota, repeated(placement, 200))
    assigned = native_assign(*operands, proportional=True)
    assert_same(assigned, spec_assign(*operands, proportional=True))
    for i, rank in np.ndindex(200, 2):
        load = int(stay[i] + away[i])
        keep = proportional_keep(int(count[i, rank, 0]), int(stay[i]), load, rank, 2)
        assert assigned.physical_indices[i, rank, 0] == (0 if keep > 0 else 3)


def test_equal_sources_together_miss_the_quota_by_at_most_one(rng):
    """The rounding is spread over the ranks."""
    case = Case(topologies.cube(), 8)
    placement = case.placement(rng)
    ids = np.repeat(tokens(rng, case, 333)[:1], 8, axis=0)
    counts = counts_of(ids, 64)
    split = solve(counts, case.r2o, placement=placement)
    operands = repeated((ids, counts, split.quota, placement), 1)
    physical = native_assign(*operands, proportional=True).physical_indices
    got = tokens_at_slots(physical, placement.n_physical)
    assert np.abs(got - np.asarray(split.quota)).max() <= 1


def test_tokens_before_saturate_instead_of_wrapping(rng):
    """Source counts whose sum exceeds 2³¹: later ranks' tokens all go to the replica."""
    case = Case(topologies.ring(4), 1)
    loads = np.full((4, 4), INT32_MAX, np.int32)
    quota = np.full(8, INT32_MAX // 2, np.int32)
    zeros = np.zeros(1, np.int32)
    split = Split(jnp.asarray(quota), zeros, zeros, zeros)
    ids = np.zeros((4, 3), np.int32)
    physical = assign(ids, loads, split, case.r2o)
    # Expert 0 lives on rank 0, which is first, and has its copy in slot 7, on rank 3.
    assert physical.tolist() == [[0] * 3] + [[7] * 3] * 3


def test_deterministic(rng):
    case = CASES["cube"](rng)
    ids = tokens(rng, case, 1000)
    loads = counts_of(ids, case.n_logical)
    split = solve(loads, case.r2o)
    first = assign(ids, loads, split, case.r2o)
    for _ in range(3):
        assert_same(first, assign(ids, loads, split, case.r2o))
