"""solve: optimal by independent proof, feasible, and equal bit for bit to the specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FAMILIES,
    INT32_MAX,
    SMALL_CASES,
    Case,
    batch,
    layers,
    random_topology,
    spoiled,
)
from oracles import assert_feasible, assert_optimal, best_cut, host_matrix
from steps import assert_same, native_solve, repeated, solve_instances, spec_solve

from lplb_jax import Status, place_experts, solve, topologies

TWINS = {"ring 2", "cube", "cube, three groups", "torus 4x4", "complete 4", "random 8x2"}


@pytest.mark.parametrize("name", CASES)
def test_optimal_over_all_load_families(rng, name):
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    for row, placement, split in zip(
        loads, layers(stacked), solve_instances(loads, stacked, case), strict=True
    ):
        assert_feasible(row, split, case, placement)
        assert_optimal(row, split, case, placement)


# One of each number of ranks and columns: compiling the specification takes a while.
@pytest.mark.parametrize("name", [name for name in CASES if name not in TWINS])
def test_equals_the_specification(rng, name):
    """Many instances: every bit of the plan is defined, not only its maximum."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case, repeat=6)
    operands = (loads[:, None], repeated(case.r2o, len(loads)), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))


@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_loads_exhaustively_random(rng, name):
    """Loads of 0 to 4, where rounding decides: many instances against all cuts."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 5, (200, case.n_logical)).astype(np.int32)
    loads *= rng.random(loads.shape) < rng.random((200, 1))
    operands = repeated((case.r2o, placement), 200)
    _, max_load, bound, _ = native_solve(loads[:, None], *operands)
    hosts = host_matrix(placement).reshape(case.n_logical, case.n_groups, -1)
    for g in range(case.n_groups):
        mine = hosts[:, g].any(axis=1)
        best = [best_cut(row[mine], hosts[mine, g]) for row in loads]
        np.testing.assert_array_equal(max_load[:, g], best)
        np.testing.assert_array_equal(bound[:, g], best)


def test_moved_tokens_come_from_a_columns_experts_in_order(rng):
    """At most one expert of a column is split; those before it are moved whole."""
    case = Case(topologies.cube(), 8, combined=4)
    placement = case.placement(rng)
    loads = rng.integers(0, 100, case.n_logical).astype(np.int32)
    quota = np.asarray(solve(loads, case.r2o, placement=placement).quota)
    home, replica = quota[placement.log2phy[:, 0]], quota[placement.log2phy[:, 1]]
    own = np.asarray(placement.phy2log).reshape(8, -1)[:, :8].reshape(8, 4, 2).swapaxes(1, 2)
    assert replica.sum() > 0
    for column in own.reshape(16, 4):
        split = (replica[column] > 0) & (home[column] > 0)
        assert split.sum() <= 1
        touched = np.flatnonzero(replica[column])
        if touched.size:
            assert (home[column[: touched[-1]]] == 0).all()


def test_loads_by_source_are_summed(rng):
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    loads = rng.integers(0, 1000, (8, 32)).astype(np.int32)
    assert_same(
        solve(loads, case.r2o, placement=placement),
        solve(loads.sum(axis=0, dtype=np.int32), case.r2o, placement=placement),
    )


def test_the_default_placement_is_the_given_order(rng):
    loads = rng.integers(0, 1000, (16, 64)).astype(np.int32)
    placement = place_experts(
        None, topologies.cube(), n_logical=64, ep_size=16, redundants_per_rank=2
    )
    assert_same(
        solve(loads, topologies.cube()), solve(loads, topologies.cube(), placement=placement)
    )


def test_solver_names(rng):
    loads = rng.integers(0, 1000, 16).astype(np.int32)
    exact = solve(loads, topologies.cube(), solver="exact")
    assert_same(exact, solve(loads, topologies.cube()))
    assert_same(exact, solve(loads, topologies.cube(), solver="auto"))


def test_deterministic(rng):
    case = CASES["random 32x4"](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 10_000, case.n_logical).astype(np.int32)
    run = jax.jit(functools.partial(solve, r2o=case.r2o, placement=placement))
    first = run(jnp.asarray(loads))
    for _ in range(5):
        assert_same(first, run(jnp.asarray(loads)))


def test_negative_loads_count_as_zero(rng):
    """The bit is set in groups with negative loads, and quotas are as for loads of 0."""
    case = Case(topologies.ring(4), 2, n_groups=2)
    placement = case.placement(rng)
    loads = rng.integers(0, 100, 16).astype(np.int32)
    chosen = rng.choice(16, rng.integers(1, 4), replace=False)
    loads[chosen] = [-1, -7, -(2**31)][: len(chosen)]
    split = solve(loads, case.r2o, placement=placement)
    clean = solve(loads.clip(0), case.r2o, placement=placement)
    groups = np.isin([0, 1], placement.log2phy[chosen, 0] // 12)
    np.testing.assert_array_equal(split.status, groups * Status.NEGATIVE_LOAD)
    assert_same(split[:3], clean[:3])


def test_a_negative_load_of_one_source_takes_nothing_from_another():
    loads = np.array([[5, -5], [3, 2]], np.int32)
    split = solve(loads, topologies.ring(2))
    assert_same(split[:3], solve(np.array([8, 2], np.int32), topologies.ring(2))[:3])
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]


def most_a_rank_can_get(loads, case, placement):
    """Largest sum over a rank's slots of their experts' loads, without copies of its own."""
    rank = np.arange(case.ep_size)[:, None]
    slots = np.asarray(placement.phy2log).reshape(case.ep_size, -1)
    group = rank // len(case.r2o) * len(case.r2o)
    local = np.arange(case.redundants_per_rank) % case.r2o.shape[1]
    source = group + case.r2o[rank[:, 0] % len(case.r2o)][:, local]
    counts = np.concatenate([np.ones((case.ep_size, case.n_local), bool), source != rank], axis=1)
    return (loads.astype(np.int64)[slots] * counts).sum(axis=1)


@pytest.mark.parametrize("name", SMALL_CASES)
@pytest.mark.parametrize("excess", [0, 1])
def test_the_largest_loads_that_fit(rng, name, excess):
    """A rank that could just receive 2³¹ − 1 tokens is solved; with one token more it is not."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    most = INT32_MAX // (case.n_local + case.redundants_per_rank)
    loads = rng.integers(0, most, case.n_logical).astype(np.int32)
    reachable = most_a_rank_can_get(loads, case, placement)
    fullest = int(reachable.argmax())
    own = np.asarray(placement.phy2log).reshape(case.ep_size, -1)[fullest, case.n_local - 1]
    loads[own] += INT32_MAX - reachable[fullest] + excess
    reachable = most_a_rank_can_get(loads, case, placement)
    assert reachable.max() == INT32_MAX + excess

    split = solve(loads, case.r2o, placement=placement)
    expected = spec_solve(*repeated((loads[None], case.r2o, placement), 1))
    assert_same(split, [result[0] for result in expected])
    over = reachable.reshape(case.n_groups, -1).max(axis=1) > INT32_MAX
    np.testing.assert_array_equal(split.status, np.where(over, Status.LOAD_OVERFLOW, 0))
    if not excess:
        assert_feasible(loads, split, case, placement)
        assert_optimal(loads, split, case, placement)


def test_overflow_moves_nothing_and_says_so():
    """As documented: quotas without replicas, max_load 2³¹ − 1, lower_bound 0; others work."""
    ring = topologies.ring(2)
    loads = np.array([[INT32_MAX, 1, 0, 5, 8, 0, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]], np.int32)
    loads = np.concatenate([loads, np.zeros((2, 8), np.int32)])
    split = solve(loads, ring)
    assert split.status.tolist() == [Status.LOAD_OVERFLOW, 0]
    assert split.max_load.tolist() == [INT32_MAX, 5]
    assert split.lower_bound.tolist() == [0, 5]
    assert split.quota.reshape(4, 3)[:2].tolist() == [[INT32_MAX, 2, 0], [0, 5, 0]]
    assert split.quota.reshape(4, 3)[2:].sum(axis=1).tolist() == [5, 5]


def test_contradictory_placement_under_jit_sets_the_status_of_its_group(rng):
    """Known values raise; traced ones cannot, so the solver looks at them."""
    case = Case(topologies.ring(4), 3, n_groups=2)
    placement = case.placement(rng)
    loads = rng.integers(0, 100, case.n_logical).astype(np.int32)
    run = jax.jit(lambda loads, placement: solve(loads, case.r2o, placement=placement))
    assert run(loads, placement).status.tolist() == [0, 0]
    group = rng.integers(2)
    for field in ["phy2log", "log2phy"]:
        array = np.array(getattr(placement, field))
        slots = placement.phy2log.reshape(2, -1)[group]
        where = rng.choice(slots) if field == "log2phy" else group * slots.size + 5
        array[where] = array[where] + rng.choice([1, 7, -100, 1000])
        bad = type(placement)(**{**vars(placement), field: array})
        status = run(loads, bad).status
        assert status[group] == Status.BAD_PLACEMENT, field


@pytest.mark.parametrize("solver", ["exact", "ipm"])
def test_slots_that_log2phy_names_besides_contradict_the_placement(rng, solver):
    """−1 in all columns after an expert's own slot and its copy, for any number of columns."""
    case = Case(topologies.ring(4), 3, n_groups=2)
    placement = case.placement(rng)
    wide = np.pad(placement.log2phy, [(0, 0), (0, int(rng.integers(3)))], constant_values=-1)
    loads = rng.integers(0, 100, case.n_logical).astype(np.int32)

    @jax.jit
    def status(log2phy):
        traced = dataclasses.replace(placement, log2phy=log2phy)
        return solve(loads, case.r2o, placement=traced, solver=solver).status

    assert status(wide).tolist() == [0, 0]
    for _ in range(10):
        expert, place = rng.choice(np.argwhere(wide == -1))
        spoiled = wide.copy()
        spoiled[expert, place] = rng.choice([*rng.integers(0, placement.n_physical, 2), -2, 10**6])
        group = placement.log2phy[expert, 0] // (placement.n_physical // 2)
        assert (status(spoiled) == Status.BAD_PLACEMENT).tolist() == [group == 0, group == 1]


@pytest.mark.parametrize("name", ["ring 4, two groups", "cube, three combined", "random 5x3"])
def test_garbage_is_the_same_garbage_everywhere(rng, name):
    """Arbitrary arrays under jit: no crash, the status says so, native and specification agree."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case, FAMILIES, repeat=3)
    loads, stacked = jax.tree.map(lambda array: spoiled(rng, array), (loads, stacked))
    operands = (loads[:, None], repeated(case.r2o, len(loads)), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))


def test_a_large_random_topology_is_solved(rng):
    """No cap on phases: 128 ranks, hot spots far from the room."""
    case = Case(random_topology(rng, 128, 1), 4)
    placement = case.placement(rng)
    loads = np.zeros(case.n_logical, np.int32)
    loads[rng.choice(case.n_logical, 5)] = rng.integers(10**6, 10**7, 5)
    loads += rng.integers(0, 1000, case.n_logical).astype(np.int32)
    split = solve(loads, case.r2o, placement=placement)
    assert_feasible(loads, split, case, placement)
    assert_optimal(loads, split, case, placement)
