"""The interior point at the limits of float32: its promises hold for any loads and weights.

Native code and specification are checked against the cuts of all sets of ranks.
"""

import jax
import numpy as np
import pytest
from any_cases import SMALL_SIZES, AnyCase
from cases import INT32_MAX, SMALL_CASES, layers
from oracles import group_views, weighted_optimum

from lplb_jax import Status, reference, solve

CONVERGED = 1e-4
TINY = float(np.finfo(np.float32).tiny)  # Smaller numbers may count as 0.
MOST = 3.4e38  # Larger rank loads, or loads / weight, overflow.
LEAST_WEIGHT = 2.0**-40  # Of the largest weight.


def log_uniform(rng, low, high, shape):
    """10^low … 10^high, as float32."""
    with np.errstate(over="ignore", under="ignore"):
        return (10.0 ** rng.uniform(low, high, shape)).astype(np.float32)


REAL_FAMILIES = {
    "zeros": lambda rng, n: np.zeros(n),
    "subnormal": lambda rng, n: log_uniform(rng, -45, -38, n),
    "just normal": lambda rng, n: log_uniform(rng, -37.5, -36, n),
    "any size": lambda rng, n: log_uniform(rng, -45, 37, n),
    "any size, some 0": lambda rng, n: log_uniform(rng, -30, 30, n) * (rng.random(n) < 0.5),
    # Each rank's load fits, but not the total.
    "total overflows": lambda rng, n: rng.uniform(0.5, 1, n) * 3.3e38 / n,
    "at the end": lambda rng, n: np.where(rng.random(n) < 0.1, 3e38, 1),
    "tiny integers": lambda rng, n: rng.integers(0, 5, n),
    "mild": lambda rng, n: rng.normal(200, 40, n).clip(0),
}
TOKEN_FAMILIES = {
    "below 5": lambda rng, n: rng.integers(0, 5, n),
    "one or none": lambda rng, n: rng.random(n) < 0.1,
    "any size": lambda rng, n: 10.0 ** rng.uniform(0, 8, n),
    "at the end": lambda rng, n: rng.integers(0, INT32_MAX // 9, n),
    "one has all": lambda rng, n: INT32_MAX * (np.arange(n) == rng.integers(n)),
}
# Along topologies, and of any placement.
PROBLEMS = SMALL_CASES | {
    name: lambda rng, name=name: AnyCase(SMALL_SIZES[name]) for name in ("3 x 4", "8 x 6")
}
KINDS = [(name, "native") for name in PROBLEMS] + [
    (name, "reference") for name in ("random 5x3", "3 x 4")
]
# Weights are between these powers of ten, above and below 1.
SPREADS = [0, 0.5, 2, 4, 12, 38]


def solver_of(kind, case, **options):
    """One compiled solve of a batch of loads, placements and weights; weights None for equal."""

    def native(row, placement, weights):
        r2o = case.r2o if case.r2o.size else None
        return solve(row, r2o, placement=placement, solver="ipm", rank_weights=weights, **options)

    def specified(row, placement, weights):
        equal = np.ones(len(case.r2o), np.float32)
        return reference.ipm(
            row[None],
            jax.numpy.asarray(placement.phy2log),
            jax.numpy.asarray(placement.log2phy),
            jax.numpy.asarray(case.r2o),
            jax.numpy.asarray(equal if weights is None else weights),
            ep_size=case.ep_size,
            weighted=int(weights is not None),
            repair=int(options.get("repair", True)),
        )

    run = jax.jit(jax.vmap(native if kind == "native" else specified))
    return lambda *operands: [np.asarray(array) for array in run(*operands)]


def taken(weights):
    """The weights as they count, of mean 1, and whether they are the given ones."""
    weights = weights.astype(np.float64)
    if not (weights >= TINY).all():  # XLA may flush smaller ones to 0.
        return None, False
    least = LEAST_WEIGHT * weights.max()
    clipped = np.maximum(weights, least)
    return clipped / clipped.mean(), (weights >= least).all()


def check(case, loads, stacked, weights, results):
    """All promises for one batch; returns the status bits of all groups."""
    quotas, max_loads, bounds, statuses = results
    integers = np.issubdtype(quotas.dtype, np.integer)
    assert np.isfinite(quotas).all()
    assert (quotas >= 0).all()
    for i, placement in enumerate(layers(stacked)):
        served, n_slots = np.zeros((2, case.n_logical))
        phy2log = np.asarray(placement.phy2log)
        np.add.at(served, phy2log, quotas[i].astype(np.float64))
        np.add.at(n_slots, phy2log[phy2log >= 0], 1)
        # A part below the smallest normal float may count as 0; along a topology there is one such
        # part, since the other is the remainder.
        lost = TINY * (1 if case.r2o.size else n_slots)
        difference = np.abs(served - loads[i])
        assert (difference <= (0 if integers else 1e-6 * np.abs(loads[i]) + lost)).all()
        shares, as_given = np.ones(len(case.r2o)), True
        if weights is not None:
            shares, as_given = taken(weights[i])
        ranks = quotas[i].astype(np.float64).reshape(case.n_groups, len(case.r2o), -1).sum(axis=2)
        for g, (group_loads, hosts) in enumerate(group_views(loads[i], case, placement)):
            status, max_load, bound = statuses[i, g], float(max_loads[i, g]), float(bounds[i, g])
            assert 0 <= bound <= max_load
            if status & Status.LOAD_OVERFLOW:
                assert bound == 0
                continue
            assert not status & ~Status.NOT_CONVERGED
            if status == 0:
                assert as_given
                assert max_load - bound <= CONVERGED * max_load * (1 + 1e-5) + TINY
            elif as_given:
                assert max_load - bound >= CONVERGED * max_load * (1 - 1e-5)
            if shares is None:
                continue
            np.testing.assert_allclose(max_load, (ranks[g] / shares).max(), rtol=2e-5, atol=TINY)
            best = weighted_optimum(group_loads, hosts, shares)
            dust = TINY * case.n_logical / shares.min()
            assert bound <= best * (1 + 2e-6) + dust
            assert max_load >= best * (1 - 2e-5) - dust
            if status == 0:
                assert max_load <= best * (1 + 1.1 * CONVERGED) + dust
    return statuses


def problem(rng, name, families):
    """A case, with loads, a placement and weights of every family and spread."""
    case = PROBLEMS[name](rng)
    kinds = [(family, spread) for family in families.values() for spread in SPREADS]
    loads = np.stack([family(rng, case.n_logical) for family, _ in kinds])
    weights = [log_uniform(rng, -spread, spread, len(case.r2o)) for _, spread in kinds]
    placements = [case.placement(rng) for _ in kinds]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *placements)
    return case, loads, stacked, np.maximum(weights, np.float32(TINY))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_any_real_loads(rng, name, weighted, kind):
    case, loads, stacked, weights = problem(rng, name, REAL_FAMILIES)
    loads = loads.astype(np.float32)
    weights = weights if weighted else None
    status = check(case, loads, stacked, weights, solver_of(kind, case)(loads, stacked, weights))
    # Within float32's resolution: no subnormal parts of loads, and weights within 1e4.
    easy = (loads.max(axis=1) > 1e-30) | (loads.max(axis=1) < TINY)
    if weighted:
        easy &= np.abs(np.log10(weights)).max(axis=1) <= 2
    assert not (status[easy] & Status.NOT_CONVERGED).any()


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_any_tokens(rng, name, weighted, repair, kind):
    case, loads, stacked, weights = problem(rng, name, TOKEN_FAMILIES)
    loads = loads.astype(np.int32)
    weights = weights if weighted else None
    run = solver_of(kind, case, repair=repair)
    status = check(case, loads, stacked, weights, run(loads, stacked, weights))
    if repair:  # For any weights that count as given.
        as_given = [weights is None or taken(weights[i])[1] for i in range(len(loads))]
        assert not (status[as_given] & Status.NOT_CONVERGED).any()
