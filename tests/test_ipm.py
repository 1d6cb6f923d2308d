"""The interior point: always feasible, near the optimum, bound never above it, repair exact."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FAMILIES, INT32_MAX, SMALL_CASES, Case, batch, layers
from oracles import (
    assert_feasible,
    assert_optimal,
    group_views,
    linear_program,
    weighted_optimum,
)
from steps import solve_instances

from lplb_jax import Status, _native, reference, solve, topologies

CONVERGED = 1e-4


def some_weights(rng, case):
    """Speeds of different kinds, as user input."""
    weights = np.exp(rng.normal(0, rng.choice([0.1, 0.5, 1.5]), len(case.r2o)))
    return (weights * rng.choice([1e-3, 1, 700])).astype(np.float32)


def normalised(weights):
    weights = weights.astype(np.float64)
    return weights / weights.mean()


solve_all = functools.partial(solve_instances, solver="ipm")


def assert_real_feasible(loads, split, case, placement):
    """Every load is served by slots that hold its expert, to float32's rounding."""
    quota = np.asarray(split.quota)
    assert quota.dtype == np.float32
    assert (quota >= 0).all()
    served = np.zeros(case.n_logical)
    np.add.at(served, np.asarray(placement.phy2log), quota)
    np.testing.assert_allclose(served, loads, rtol=1e-6)


def assert_status_is_the_gap(split):
    """0 exactly if the reported max_load is within 1e-4 of the reported lower_bound."""
    gap = np.asarray(split.max_load, np.float64) - split.lower_bound
    assert (gap >= 0).all()
    near = gap <= CONVERGED * np.asarray(split.max_load, np.float64) * (1 + 1e-6)
    np.testing.assert_array_equal(split.status, np.where(near, 0, Status.NOT_CONVERGED))


@pytest.mark.parametrize("name", CASES)
def test_repair_ends_at_the_true_optimum(rng, name):
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    for row, placement, split in zip(
        loads, layers(stacked), solve_all(loads, stacked, case), strict=True
    ):
        assert_feasible(row, split, case, placement)
        assert_optimal(row, split, case, placement)


@pytest.mark.parametrize("name", CASES)
def test_without_repair_the_bound_is_the_optimum_and_the_plan_is_near(rng, name):
    """Rounding moves a rank by less than half a token per edge."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    exact = jax.jit(jax.vmap(lambda row, placement: solve(row, case.r2o, placement=placement)))
    best = np.asarray(exact(loads, stacked).max_load)
    splits = solve_all(loads, stacked, case, repair=False)
    for i, (row, placement) in enumerate(zip(loads, layers(stacked), strict=True)):
        assert_feasible(row, splits[i], case, placement)
        assert (splits[i].lower_bound <= best[i]).all()
        slack = case.r2o.shape[1] + 1 + CONVERGED * best[i]
        assert (splits[i].max_load <= best[i] + slack).all()
        assert_status_is_the_gap(splits[i])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_real_loads(rng, name, weighted):
    """Within 1e-4 of the proven bound, and the bound is correct by HiGHS."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    # Neither integers nor in any particular unit.
    loads = (loads * rng.uniform(0.5, 1, loads.shape) * 10.0 ** rng.integers(-20, 20)).astype(
        np.float32
    )
    weights = some_weights(rng, case) if weighted else None
    shares = normalised(weights) if weighted else np.ones(len(case.r2o))
    splits = solve_all(loads, stacked, case, rank_weights=weights)
    for row, placement, split in zip(loads, layers(stacked), splits, strict=True):
        assert_real_feasible(row, split, case, placement)
        np.testing.assert_array_equal(split.status, 0)
        ranks = split.quota.reshape(case.n_groups, len(case.r2o), -1).astype(np.float64)
        largest = (ranks.sum(axis=2) / shares).max(axis=1)
        np.testing.assert_allclose(split.max_load, largest, rtol=1e-5)
        assert (split.max_load - split.lower_bound <= CONVERGED * split.max_load).all()
        unit = max(float(row.max()), 1e-30)
        for g, (group_loads, hosts) in enumerate(group_views(row / unit, case, placement)):
            best = linear_program(group_loads.astype(np.float64), hosts, shares)[0] * unit
            assert split.lower_bound[g] <= best * (1 + 1e-7)
            assert split.max_load[g] >= best * (1 - 1e-6)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", ["cube", "ring 4, two groups", "torus 4x4", "random 5x3"])
def test_weighted_tokens(rng, name, repair):
    """Repaired, the largest load / weight is the least that whole tokens allow."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    weights = some_weights(rng, case)
    shares = normalised(weights)
    splits = solve_all(loads, stacked, case, rank_weights=weights, repair=repair)
    for row, placement, split in zip(loads, layers(stacked), splits, strict=True):
        assert split.max_load.dtype == split.lower_bound.dtype == np.float32
        assert split.quota.dtype == np.int32
        served = np.zeros(case.n_logical, np.int64)
        np.add.at(served, np.asarray(placement.phy2log), split.quota)
        np.testing.assert_array_equal(served, row)
        assert_status_is_the_gap(split)
        ranks = split.quota.reshape(case.n_groups, len(case.r2o), -1).sum(axis=2, dtype=np.int64)
        np.testing.assert_allclose(split.max_load, (ranks / shares).max(axis=1), rtol=1e-6)
        for g, (group_loads, hosts) in enumerate(group_views(row, case, placement)):
            best = weighted_optimum(group_loads, hosts, shares)
            assert split.lower_bound[g] <= best * (1 + 1e-6)
            if repair:
                assert split.status[g] == 0
                assert split.max_load[g] <= best * (1 + 2e-6)


@pytest.mark.parametrize("name", ["cube", "torus 4x4", "random 5x3", "complete 8"])
@pytest.mark.parametrize("floats", [False, True])
def test_agrees_with_the_specification(rng, name, floats):
    """To float32's tolerance: plans may differ, their largest loads may not."""
    case = CASES[name](rng)
    loads, stacked = batch(rng, case)
    loads = loads[:, None].astype(np.float32 if floats else np.int32)
    operands = (loads, stacked.phy2log, stacked.log2phy)
    static: dict[str, Any] = {"ep_size": case.ep_size, "weighted": 1, "repair": 1, "cusolverdx": 0}
    weights = jnp.asarray(some_weights(rng, case))

    def native(*one):
        return _native.call("lplb_ipm", reference.ipm, *one, case.r2o, weights, **static)

    def spec(*one):
        return reference.ipm(*one, jnp.asarray(case.r2o), weights, **static)

    left, right = (
        jax.tree.map(np.asarray, jax.jit(jax.vmap(f))(*operands)) for f in (native, spec)
    )
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    np.testing.assert_array_equal(left[3], right[3])
    one_token = 0 if floats else 1 / normalised(np.asarray(weights)).min()
    np.testing.assert_allclose(left[1], right[1], rtol=CONVERGED, atol=one_token)
    np.testing.assert_allclose(left[2], right[2], rtol=CONVERGED)


def test_auto_picks_by_what_is_asked(rng):
    loads = rng.integers(0, 1000, 16).astype(np.int32)
    cube = topologies.cube()
    assert solve(loads, cube).max_load.dtype == np.int32
    assert solve(loads.astype(np.float32), cube).quota.dtype == np.float32
    assert solve(loads, cube, rank_weights=np.ones(8)).max_load.dtype == np.float32


def test_equal_weights_are_no_weights(rng):
    loads = rng.random(16).astype(np.float32)
    plain = solve(loads, topologies.cube())
    equal = solve(loads, topologies.cube(), rank_weights=np.full(8, 3.0))
    np.testing.assert_allclose(equal.max_load, plain.max_load, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "simplex"}, ValueError, "solver: expected one of auto, exact, ipm"),
        (
            {"solver": "exact", "rank_weights": np.ones(8)},
            ValueError,
            "rank_weights: expected None",
        ),
        ({"rank_weights": np.ones(7)}, ValueError, r"rank_weights: expected shape .* \[8\]"),
        ({"rank_weights": np.arange(8)}, ValueError, "rank_weights: expected positive"),
        ({"rank_weights": np.full(8, np.nan)}, ValueError, "rank_weights: expected positive"),
        ({"factor": "qr"}, ValueError, "factor: expected one of elimination, cusolverdx, got 'qr'"),
        ({"factor": "cusolverdx"}, ValueError, "factor: expected 'elimination' for solver='exact'"),
    ],
)
def test_messages(options, error, message):
    with pytest.raises(error, match=message):
        solve(np.ones(16, np.int32), topologies.cube(), **options)


def test_a_factor_for_gpus_alone(monkeypatch):
    """A program may target the CPU, also on a machine that has it."""
    gpu = types.SimpleNamespace(has_cusolverdx=lambda: True)
    monkeypatch.setattr(_native, "cuda", lambda: gpu)
    run = jax.jit(lambda loads: solve(loads, topologies.cube(), factor="cusolverdx"))
    with pytest.raises(ValueError, match=r"^factor: expected 'elimination' .* got 'cusolverdx'"):
        run.trace(np.ones(16, np.float32)).lower(lowering_platforms=("cpu",))


def test_the_exact_solver_refuses_real_loads():
    with pytest.raises(ValueError, match=r"loads: expected int32 for solver='exact', got float32"):
        solve(np.ones(16, np.float32), topologies.cube(), solver="exact")


def test_traced_weights_that_are_none_set_the_status():
    loads = np.arange(16, dtype=np.float32)
    run = jax.jit(lambda weights: solve(loads, topologies.cube(), rank_weights=weights))
    assert run(jnp.ones(8)).status.tolist() == [0]
    bad = run(jnp.ones(8).at[3].set(-1))
    assert bad.status.tolist() == [Status.NOT_CONVERGED]
    np.testing.assert_array_equal(bad.quota, run(jnp.ones(8)).quota)


def test_loads_that_are_no_numbers():
    """NaN and negative loads count as 0; with infinity nothing moves."""
    loads = np.arange(1, 17, dtype=np.float32)
    spoiled = loads.copy()
    spoiled[[3, 5]] = [np.nan, -2]
    clean = np.where(np.isin(np.arange(16), [3, 5]), 0, loads).astype(np.float32)
    split = solve(spoiled, topologies.cube())
    assert split.status.tolist() == [Status.NEGATIVE_LOAD]
    np.testing.assert_array_equal(split.quota, solve(clean, topologies.cube()).quota)
    loads[2] = np.inf
    split = solve(loads, topologies.cube())
    assert split.status.tolist() == [Status.LOAD_OVERFLOW]
    assert split.max_load.tolist() == [np.inf]
    assert split.lower_bound.tolist() == [0]


def test_overflow_as_the_exact_solver(rng):
    ring = topologies.ring(2)
    loads = np.array([INT32_MAX, 1, 0, 5], np.int32)
    for repair in [False, True]:
        ours = solve(loads, ring, solver="ipm", repair=repair)
        for a, b in zip(ours, solve(loads, ring), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SMALL_CASES)
def test_ties(rng, name):
    """Loads of 0 to 4: many sets of ranks bind at once, and the matrix is nearly singular."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 5, (200, case.n_logical)) * (rng.random((200, 1)) < 0.9)
    run = jax.jit(jax.vmap(lambda row: solve(row, case.r2o, placement=placement)))
    split = run(loads.astype(np.float32))
    assert (split.status == 0).all()
    exact = run(loads.astype(np.int32))
    np.testing.assert_array_equal(np.ceil(split.lower_bound * (1 - 1e-4)), exact.max_load)


def test_jit_vmap_and_shard_map(rng, cpu_devices):
    case = Case(topologies.ring(4), 4)
    loads = rng.random((8, case.n_logical)).astype(np.float32)
    one = functools.partial(solve, r2o=case.r2o)
    expected = [np.asarray(one(row).max_load) for row in loads]
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(loads).max_load, expected, rtol=1e-5)
    mesh = jax.sharding.Mesh(cpu_devices, ("x",))
    spec = jax.sharding.PartitionSpec("x")
    with jax.default_device(cpu_devices[0]):
        mapped = jax.jit(jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec))
        if jax.default_backend() == "cpu":
            np.testing.assert_allclose(mapped(loads).max_load, expected, rtol=1e-5)


def test_empty_and_equal_loads(rng):
    for family in [np.zeros(16), np.full(16, 7), np.full(16, 1e-30), np.full(16, 1e30)]:
        split = solve(family.astype(np.float32), topologies.cube())
        assert split.status.tolist() == [0]
        np.testing.assert_allclose(split.max_load, family[:2].sum(), rtol=1e-5)


MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("mode", MODES)
def test_modes_change_nothing(rng, mode, dtype, weighted):
    """The same bits and dtypes. The specification is also traced, for the types of the results."""
    case = CASES["ring 4, two groups"](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 1000, case.n_logical).astype(dtype)
    weights = some_weights(rng, case) if weighted else None

    def run(loads):
        options = {"placement": placement, "solver": "ipm", "rank_weights": weights}
        return jax.jit(functools.partial(solve, r2o=case.r2o, **options))(loads)

    expected = run(jnp.asarray(loads))
    with MODES[mode]():
        found = run(jnp.asarray(loads))
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_gpu_deterministic(rng):
    """The same input gives the same bits, run to run."""
    case = CASES["random 32x4"](rng)
    loads, stacked = batch(rng, case, FAMILIES)
    run = jax.jit(
        jax.vmap(lambda row, placement: solve(row, case.r2o, placement=placement, solver="ipm"))
    )
    first = run(loads, stacked)
    for _ in range(5):
        for a, b in zip(first, run(loads, stacked), strict=True):
            np.testing.assert_array_equal(a, b)
