"""The interior point on any placement: feasible, proven, and as good as HiGHS."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import SIZES, AnyCase, Sizes, loads_for
from cases import INT32_MAX, layers
from meshes import n_compiled
from oracles import assert_hosted, host_matrix, linear_program, tokens_at_slots, weighted_optimum
from steps import assert_same

from lplb_jax import Placement, Status, _native, rebalance, reference, solve, verify

CONVERGED = 1e-4
SHAPES = {
    name: SIZES[name] for name in ["one rank", "2 x 3", "5 x 7", "8 x 40", "33 x 3", "64 x 6"]
}


def instances(rng, sizes: Sizes, n: int):
    """Loads of every kind, and a placement for each."""
    placed = [AnyCase(sizes).placement(rng) for _ in range(n)]
    loads = np.stack([loads_for(rng, sizes, host_matrix(placement)) for placement in placed])
    return loads, jax.tree.map(lambda *arrays: np.stack(arrays), *placed)


def some_weights(rng, n_ranks: int) -> np.ndarray:
    weights = np.exp(rng.normal(0, rng.choice([0.1, 0.5, 1.5]), n_ranks))
    return (weights * rng.choice([1e-3, 1, 700])).astype(np.float32)


def solve_all(loads, stacked, weights=None, **options):
    """The public solve: one Split per instance, through one compilation."""

    def one(loads, placement):
        return solve(loads, placement=placement, solver="ipm", rank_weights=weights, **options)

    splits = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(loads, stacked))
    return [jax.tree.map(lambda array, i=i: array[i], splits) for i in range(len(loads))]


def served(quota: np.ndarray, placement: Placement) -> np.ndarray:
    """The sum over each expert's slots; empty slots must have nothing."""
    phy2log = np.asarray(placement.phy2log)
    assert (quota >= 0).all()
    assert not quota[phy2log < 0].any()
    total = np.zeros(placement.n_logical)
    np.add.at(total, phy2log[phy2log >= 0], quota[phy2log >= 0].astype(np.float64))
    return total


def rank_loads(quota: np.ndarray, placement: Placement) -> np.ndarray:
    return quota.astype(np.float64).reshape(placement.ep_size, -1).sum(axis=1)


def mean_one(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / weights.astype(np.float64).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_real_loads(rng, name, weighted):
    """Within 1e-4 of the proven bound, and the bound is correct by HiGHS."""
    sizes = SHAPES[name]
    loads, stacked = instances(rng, sizes, 6 if sizes.n_physical > 250 else 25)
    # Neither integers nor in any particular unit.
    unit = 10.0 ** rng.integers(-20, 20)
    loads = (loads * rng.uniform(0.5, 1, loads.shape) * unit).astype(np.float32)
    weights = some_weights(rng, sizes.ep_size) if weighted else None
    shares = mean_one(weights) if weighted else np.ones(sizes.ep_size)
    for row, placement, split in zip(
        loads, layers(stacked), solve_all(loads, stacked, weights), strict=True
    ):
        assert [array.dtype for array in split] == [np.float32] * 3 + [np.int32]
        assert split.status.tolist() == [0]
        np.testing.assert_allclose(served(split.quota, placement), row, rtol=1e-6)
        largest = (rank_loads(split.quota, placement) / shares).max()
        np.testing.assert_allclose(split.max_load, largest, rtol=1e-5)
        assert 0 <= split.max_load - split.lower_bound <= CONVERGED * split.max_load
        scale = max(float(row.max()), 1e-30)
        real = (row / scale).astype(np.float64)
        best = linear_program(real, host_matrix(placement), shares)[0] * scale
        assert split.lower_bound <= best * (1 + 1e-7)
        assert split.max_load >= best * (1 - 1e-6)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens(rng, name, repair):
    """With repair, as few on the busiest rank as by the exact solver; else as the status says."""
    sizes = SHAPES[name]
    loads, stacked = instances(rng, sizes, 6 if sizes.n_physical > 250 else 40)
    best = jax.jit(jax.vmap(lambda row, placement: solve(row, placement=placement).max_load))
    for row, placement, split, least in zip(
        loads,
        layers(stacked),
        solve_all(loads, stacked, repair=repair),
        np.asarray(best(loads, stacked)),
        strict=True,
    ):
        assert [array.dtype for array in split] == [np.int32] * 4
        np.testing.assert_array_equal(served(split.quota, placement), row)
        assert split.max_load == rank_loads(split.quota, placement).max()
        gap = float(split.max_load[0]) - float(split.lower_bound[0])
        near = gap <= CONVERGED * float(split.max_load[0]) * (1 + 1e-6)
        assert split.status.tolist() == [0 if near else Status.NOT_CONVERGED]
        assert split.lower_bound <= least <= split.max_load
        # Rounding is off by less than a token for every cell.
        cells = host_matrix(placement).sum(axis=0).max()
        assert split.max_load <= least + (0 if repair else cells + CONVERGED * least)
        if repair:
            assert split.lower_bound == least
            assert verify(row, split, placement=placement) == []


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", ["3 x 4", "5 x 7", "8 x 6"])
def test_weighted_tokens(rng, name, repair):
    """Repaired, the largest load / weight is the least that whole tokens allow."""
    sizes = SIZES[name]
    loads, stacked = instances(rng, sizes, 20)
    weights = some_weights(rng, sizes.ep_size)
    shares = mean_one(weights)
    splits = solve_all(loads, stacked, weights, repair=repair)
    for row, placement, split in zip(loads, layers(stacked), splits, strict=True):
        np.testing.assert_array_equal(served(split.quota, placement), row)
        largest = (rank_loads(split.quota, placement) / shares).max()
        np.testing.assert_allclose(split.max_load, largest, rtol=1e-6)
        best = weighted_optimum(row, host_matrix(placement), shares)
        assert split.lower_bound <= best * (1 + 1e-6)
        assert split.max_load >= best * (1 - 2e-6)
        if repair:
            assert split.status == 0
            assert split.max_load <= best * (1 + 2e-6)


@pytest.mark.parametrize(("name", "floats"), [("3 x 4", False), ("8 x 6", True)])
def test_agrees_with_the_specification(rng, name, floats):
    """To float32's tolerance: plans may differ, their largest loads may not."""
    sizes = SIZES[name]
    loads, stacked = instances(rng, sizes, 40)
    loads[::5] *= 5  # Some overflow, some are negative.
    loads = loads[:, None].astype(np.float32) * 0.37 if floats else loads[:, None]
    if floats:
        loads[1::7, 0, 0] = np.nan
        loads[2::7, 0, 1] = np.inf
    weights = jnp.asarray(some_weights(rng, sizes.ep_size))
    r2o = np.zeros((sizes.ep_size, 0), np.int32)
    static: dict[str, Any] = {"ep_size": sizes.ep_size, "weighted": 1, "repair": 1, "cusolverdx": 0}

    def native(*one):
        return _native.call("lplb_ipm", reference.ipm, *one, r2o, weights, **static)

    def spec(*one):
        return reference.ipm(*one, jnp.asarray(r2o), weights, **static)

    operands = (loads.astype(np.float32 if floats else np.int32), stacked.phy2log, stacked.log2phy)
    left, right = (
        jax.tree.map(np.asarray, jax.jit(jax.vmap(f))(*operands)) for f in (native, spec)
    )
    for a, b in zip(left, right, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(left[3], right[3])
    token = 0 if floats else 1 / mean_one(np.asarray(weights)).min()
    np.testing.assert_allclose(left[1], right[1], rtol=CONVERGED, atol=token)
    np.testing.assert_allclose(left[2], right[2], rtol=CONVERGED)
    # Where loads are too large, all stay at home.
    over = (right[3][:, 0] & Status.LOAD_OVERFLOW) != 0
    np.testing.assert_array_equal(left[0][over], right[0][over])


def test_loads_that_are_no_numbers(rng):
    """NaN and negative loads count as 0; with infinity nothing is split."""
    placement = AnyCase(SIZES["5 x 7"]).placement(rng)
    run = jax.jit(lambda loads: solve(loads, placement=placement))
    loads = rng.uniform(1, 2, 11).astype(np.float32)
    spoiled = loads.copy()
    spoiled[[3, 5]] = [np.nan, -2]
    clean = np.where(np.isin(np.arange(11), [3, 5]), 0, loads).astype(np.float32)
    split = run(spoiled)
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]
    np.testing.assert_array_equal(split.quota, run(clean).quota)
    loads[2] = np.inf
    split = run(loads)
    assert split.status.tolist() == [Status.LOAD_OVERFLOW]
    assert (split.max_load.tolist(), split.lower_bound.tolist()) == ([np.inf], [0])
    home = np.asarray(placement.log2phy)[:, 0]
    expected = np.zeros(placement.n_physical, np.float32)
    expected[home] = np.minimum(loads, np.finfo(np.float32).max)
    np.testing.assert_array_equal(split.quota, expected)


def test_overflow_and_bad_tables_as_the_exact_solver(rng):
    """The status of inconsistent tables, and the complete result for large loads."""
    sizes = SIZES["8 x 6"]
    good = AnyCase(sizes).placement(rng)
    solvers = [
        jax.jit(
            functools.partial(lambda loads, p, how: solve(loads, placement=p, solver=how), how=h)
        )
        for h in ("exact", "ipm")
    ]
    loads = rng.integers(INT32_MAX // 2, INT32_MAX, sizes.n_logical).astype(np.int32)
    exact, ipm = (solver(loads, good) for solver in solvers)
    assert exact.status.tolist() == [Status.LOAD_OVERFLOW]
    assert_same(exact, ipm)
    loads = rng.integers(0, 100, sizes.n_logical).astype(np.int32)
    seen = set()
    for _ in range(20):
        phy2log, log2phy = np.array(good.phy2log), np.array(good.log2phy)
        spoilt = phy2log if rng.random() < 0.5 else log2phy
        where = (int(rng.integers(len(spoilt))), 0)[: spoilt.ndim]
        spoilt[where] = rng.choice([-(2**31), -7, -1, 0, sizes.n_logical, 2**31 - 1])
        placement = Placement(phy2log, log2phy, good.logcnt, sizes.ep_size)
        exact, ipm = (solver(loads, placement) for solver in solvers)
        assert_same(exact._replace(quota=()), ipm._replace(quota=()))
        seen |= set(exact.status.tolist())
    assert Status.BAD_PLACEMENT in seen


def test_rebalance_by_weights(rng):
    """Exact to the token, and a new placement or other weights need no compilation."""
    sizes = SIZES["5 x 7"]
    run = jax.jit(
        lambda ids, placement, weights: rebalance(
            ids, None, placement=placement, solver="ipm", rank_weights=weights
        )
    )
    for _ in range(5):
        placement = AnyCase(sizes).placement(rng)
        ids = rng.integers(0, sizes.n_logical, 500).astype(np.int32)
        weights = some_weights(rng, sizes.ep_size)
        physical, split = run(ids, placement, weights)
        assert_hosted(ids, physical, placement)
        np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
        counts = np.bincount(ids, minlength=sizes.n_logical)
        best = weighted_optimum(counts, host_matrix(placement), mean_one(weights))
        assert split.status.tolist() == [0]
        np.testing.assert_allclose(split.max_load, best, rtol=2e-6)
    assert n_compiled(run) == 1


def test_two_hosts_each_are_a_topology(rng):
    """Where every expert has one copy, the real optimum is the one along the topology."""
    table = [[0, 1, 6], [2, 3, 0], [4, 5, 2], [6, 7, 4]]
    anywhere = Placement.from_phy2log(table, ep_size=4)
    r2o = np.array([[3], [0], [1], [2]], np.int32)
    loads = rng.lognormal(0, 2, 8).astype(np.float32)
    split = solve(loads, placement=anywhere)
    along = solve(loads, r2o)
    assert split.status.tolist() == along.status.tolist() == [0]
    np.testing.assert_allclose(split.max_load, along.max_load, rtol=CONVERGED)


def test_cusolverdx_is_for_topologies(rng):
    placement = AnyCase(SIZES["3 x 4"]).placement(rng)
    with pytest.raises(ValueError, match="factor: expected 'elimination' for a placement without"):
        solve(np.ones(7, np.float32), placement=placement, factor="cusolverdx")
