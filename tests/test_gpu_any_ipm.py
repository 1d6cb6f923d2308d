"""The interior point on any placement on an NVIDIA GPU: as good as the CPU's, and by HiGHS."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import SIZES, AnyCase, Sizes, loads_for
from cases import layers
from oracles import assert_hosted, host_matrix, linear_program, tokens_at_slots
from test_gpu_any import on

from lplb_jax import Placement, Status, rebalance, solve

pytestmark = pytest.mark.gpu

CONVERGED = 1e-4
# Around the numbers of ranks with a specialized kernel (16, 32, 64, 128).
SHAPES = {
    name: SIZES[name]
    for name in ["one rank", "2 x 3", "8 x 6", "8 x 40", "16 x 5", "33 x 3", "64 x 6", "65 x 2"]
} | {"32 x 10": Sizes(32, 10, 256), "128 x 3": Sizes(128, 3, 256), "17 x 9": Sizes(17, 9, 100)}


def instances(rng, sizes: Sizes, n: int, floats: bool):
    """Loads of every kind, a placement and weights for each."""
    placed = [AnyCase(sizes).placement(rng) for _ in range(n)]
    loads = np.stack([loads_for(rng, sizes, host_matrix(placement)) for placement in placed])
    if floats:
        loads = (loads * rng.uniform(0.5, 1, loads.shape) * 10.0 ** rng.integers(-9, 9)).astype(
            np.float32
        )
    weights = np.exp(rng.normal(0, 0.5, (n, sizes.ep_size))).astype(np.float32)
    return loads, jax.tree.map(lambda *arrays: np.stack(arrays), *placed), weights


def solver(weighted: bool, repair: bool = True):
    def one(loads, placement, weights):
        weights = weights if weighted else None
        options = {"solver": "ipm", "rank_weights": weights, "repair": repair}
        return solve(loads, placement=placement, **options)

    return jax.vmap(one)


def check(loads, split, placement: Placement, weights, slack: float) -> None:
    """The split is feasible, max_load matches it, and lower_bound is at most HiGHS's optimum."""
    quota, phy2log = split.quota.astype(np.float64), np.asarray(placement.phy2log)
    assert (quota >= 0).all()
    assert not quota[phy2log < 0].any()
    served = np.zeros(placement.n_logical)
    np.add.at(served, phy2log[phy2log >= 0], quota[phy2log >= 0])
    np.testing.assert_allclose(served, loads, rtol=1e-6 if loads.dtype == np.float32 else 0)
    shares = weights / weights.mean(dtype=np.float64)
    largest = (quota.reshape(placement.ep_size, -1).sum(axis=1) / shares).max()
    np.testing.assert_allclose(split.max_load, largest, rtol=1e-5)
    scale = max(float(loads.max()), 1e-30)
    real = loads.astype(np.float64) / scale
    best = linear_program(real, host_matrix(placement), shares)[0] * scale
    # Whole tokens may need more than HiGHS's fractions of them.
    assert split.lower_bound <= best * (1 + 1e-6) + slack
    assert split.max_load >= best * (1 - 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_real_loads(rng, name, weighted):
    sizes = SHAPES[name]
    operands = instances(rng, sizes, 20, floats=True)
    split = on("gpu", solver(weighted), *operands)
    assert not split.status.any()
    assert (split.max_load - split.lower_bound <= CONVERGED * split.max_load).all()
    other = on("cpu", solver(weighted), *operands)
    np.testing.assert_allclose(split.max_load, other.max_load, rtol=2 * CONVERGED)
    for i, placement in enumerate(layers(operands[1])[:5]):
        weights = operands[2][i] if weighted else np.ones(sizes.ep_size, np.float32)
        check(operands[0][i], jax.tree.map(lambda a, i=i: a[i], split), placement, weights, 0)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens(rng, name, weighted, repair):
    sizes = SHAPES[name]
    operands = instances(rng, sizes, 20, floats=False)
    split = on("gpu", solver(weighted, repair), *operands)
    other = on("cpu", solver(weighted, repair), *operands)
    shares = operands[2] / operands[2].mean(axis=1, keepdims=True, dtype=np.float64)
    token = 1 / shares.min(axis=1, keepdims=True) if weighted else 1
    if repair and not weighted:
        assert not split.status.any()
        np.testing.assert_array_equal(split.max_load, other.max_load)
        np.testing.assert_array_equal(split.lower_bound, other.lower_bound)
        best = on("gpu", jax.vmap(lambda x, p: solve(x, placement=p)), *operands[:2])
        np.testing.assert_array_equal(split.max_load, best.max_load)
    elif repair:
        assert not split.status.any()
        np.testing.assert_allclose(split.max_load, other.max_load, rtol=2e-6)
    else:
        near = split.max_load - split.lower_bound <= CONVERGED * split.max_load * (1 + 1e-6)
        np.testing.assert_array_equal(split.status == 0, near)
        cells = max(host_matrix(p).sum(axis=0).max() for p in layers(operands[1]))
        gap = np.abs(np.float64(split.max_load) - other.max_load)
        assert (gap <= 2 * CONVERGED * other.max_load + (cells + 1) * token).all()
    for i, placement in enumerate(layers(operands[1])[:5]):
        weights = operands[2][i] if weighted else np.ones(sizes.ep_size, np.float32)
        slack = 1.01 * float(np.max(token))
        check(operands[0][i], jax.tree.map(lambda a, i=i: a[i], split), placement, weights, slack)


@pytest.mark.parametrize("name", ["2 x 3", "8 x 6", "33 x 3", "128 x 3"])
@pytest.mark.parametrize("floats", [False, True])
def test_bad_input(rng, name, floats):
    """Invalid or too large loads, by source; invalid weights; invalid tables."""
    sizes = SHAPES[name]
    n = 40
    _, stacked, weights = instances(rng, sizes, n, floats)
    loads = rng.integers(0, 1000, (n, sizes.ep_size, sizes.n_logical)).astype(np.int32)
    loads[::4] *= 2**20
    loads[1::4, 0, 0] = -1
    if floats:
        loads = (loads * 0.37).astype(np.float32)
        loads[1::4, 0, 0] = np.nan
        loads[2::4, -1, -1] = np.inf
    phy2log = np.array(stacked.phy2log)
    wild = rng.random(phy2log.shape) < 0.1 * (np.arange(n) % 3 == 0)[:, None]
    phy2log[wild] = rng.choice([-(2**31), -7, -1, 0, sizes.n_logical, 2**31 - 1], wild.sum())
    weights[::5, 0] = rng.choice([-1, 0, np.nan, np.inf], len(weights[::5]))
    placements = Placement(phy2log, stacked.log2phy, stacked.logcnt, sizes.ep_size)
    run = solver(weighted=True)
    split, other = (on(platform, run, loads, placements, weights) for platform in ("gpu", "cpu"))
    np.testing.assert_array_equal(split.status, other.status)
    over = (split.status[:, 0] & Status.LOAD_OVERFLOW) != 0
    assert over.any()
    for field in ("quota", "max_load", "lower_bound"):
        ours, theirs = getattr(split, field)[over], getattr(other, field)[over]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # Floats are added in another order.


def test_deterministic(rng):
    """The same bits, run to run, though threads may number the cells in another order."""
    operands = instances(rng, SHAPES["64 x 6"], 20, floats=True)
    first = on("gpu", solver(True), *operands)
    for _ in range(10):
        for a, b in zip(first, on("gpu", solver(True), *operands), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rebalance_by_weights(rng):
    sizes = SHAPES["8 x 6"]
    placement = AnyCase(sizes).placement(rng)
    ids = rng.integers(0, sizes.n_logical, 5000).astype(np.int32)
    weights = rng.uniform(0.5, 2, sizes.ep_size).astype(np.float32)
    physical, split = on(
        "gpu", lambda ids: rebalance(ids, None, placement=placement, rank_weights=weights), ids
    )
    assert_hosted(ids, physical, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
    assert split.status.tolist() == [0]


def test_more_ranks_than_a_block_factors(rng):
    placement = AnyCase(Sizes(129, 2, 200)).placement(rng)
    with pytest.raises(Exception, match=r"placement: .* interior point takes at most 128 ranks"):
        jax.block_until_ready(solve(jnp.ones(200, jnp.float32), placement=placement))
