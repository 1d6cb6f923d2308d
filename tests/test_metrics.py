"""The metrics against NumPy."""

import dataclasses

import any_cases
import jax
import numpy as np
import pytest
from cases import CASES, SMALL_CASES, Case
from oracles import slots_of

from lplb_jax import Placement, metrics, solve, topologies


@pytest.mark.parametrize("name", SMALL_CASES)
def test_quotas_without_balancing(rng, name):
    """All at home, or evenly over the slots, earlier slots first; both serve every token once."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 100, case.n_logical).astype(np.int32)
    home, even = np.zeros((2, placement.n_physical), np.int32)
    for expert, slots in enumerate(slots_of(placement)):
        slots = sorted(slots, key=list(placement.log2phy[expert]).index)
        home[slots[0]] = loads[expert]
        for i, slot in enumerate(slots):
            even[slot] = loads[expert] // len(slots) + (i < loads[expert] % len(slots))
    np.testing.assert_array_equal(jax.jit(metrics.home_quota)(loads, placement), home)
    np.testing.assert_array_equal(jax.jit(metrics.even_quota)(loads, placement), even)


def test_rank_loads_and_tokens_moved(rng):
    case = CASES["cube, three combined"](rng)
    placement = case.placement(rng)
    quota = rng.integers(0, 100, placement.n_physical).astype(np.int32)
    ranks = quota.reshape(8, -1)
    np.testing.assert_array_equal(metrics.rank_loads(quota, 8), ranks.sum(axis=1))
    assert int(metrics.tokens_moved(quota, placement)) == ranks[:, 8:].sum()
    assert int(metrics.tokens_moved(metrics.home_quota(quota[:64], placement), placement)) == 0


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_stacked_layers(rng, cpu_devices, kind):
    """Layer by layer, with any sharding, and one placement per layer or one for all."""
    case = CASES["cube"](rng)
    layers = [case.placement(rng) for _ in range(4)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    mesh = jax.sharding.Mesh(cpu_devices, "ep", axis_types=(kind,))
    spec = jax.sharding.PartitionSpec
    sharding = jax.sharding.NamedSharding(mesh, spec(None, "ep"))
    loads = rng.integers(0, 100, (4, case.n_logical)).astype(np.int32)
    quotas = rng.integers(0, 100, (4, layers[0].n_physical)).astype(np.int32)
    for metric, array in (
        (metrics.home_quota, loads),
        (metrics.even_quota, loads),
        (metrics.tokens_moved, quotas),
    ):
        for of_layers, placements in ((layers, stacked), ([layers[0]] * 4, layers[0])):
            want = [metric(*pair) for pair in zip(array, of_layers, strict=True)]
            for given in (array, jax.device_put(array, sharding)):
                np.testing.assert_array_equal(metric(given, placements), want)
                np.testing.assert_array_equal(jax.jit(metric)(given, placements), want)
        batches = metric(np.stack([array, array + 1], axis=1), stacked)
        np.testing.assert_array_equal(batches[:, 0], metric(array, stacked))
        np.testing.assert_array_equal(batches[:, 1], metric(array + 1, stacked))
        for wrong in (array[:3], array[0], array[:, :-1]):
            with pytest.raises(ValueError, match=r"^(loads|quota): expected \[4, \.\.\., .*got"):
                metric(wrong, stacked)
    want = [metrics.rank_loads(quota, 8) for quota in quotas]
    for given in (quotas, jax.device_put(quotas, sharding)):
        np.testing.assert_array_equal(metrics.rank_loads(given, 8), want)
    np.testing.assert_array_equal(metrics.rank_loads(quotas[None], 8), np.array(want)[None])
    with pytest.raises(ValueError, match=r"^quota: .*ep_size = 7, got \[4, "):
        metrics.rank_loads(quotas, 7)


def test_imbalance_and_gain(rng):
    before, after = rng.integers(1, 1000, (2, 3, 8))
    np.testing.assert_allclose(
        metrics.imbalance(before), before.max(axis=1) / before.mean(axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics.gain(before, after), before.max(axis=1) / after.max(axis=1), rtol=1e-6
    )


def test_no_load_is_in_balance():
    zeros = np.zeros((2, 4), np.int32)
    np.testing.assert_array_equal(metrics.imbalance(zeros), [1, 1])
    np.testing.assert_array_equal(metrics.gain(zeros, zeros), [1, 1])


def test_gap(rng):
    case = CASES["ring 4, two groups"](rng)
    split = solve(rng.integers(0, 100, (8, 16)).astype(np.int32), case.r2o)
    assert metrics.gap(split).tolist() == [0, 0]
    worse = split._replace(max_load=split.max_load + np.array([0, 3], np.int32))
    np.testing.assert_allclose(metrics.gap(worse), [0, 3 / split.lower_bound[1]], rtol=1e-6)
    nothing = split._replace(max_load=split.max_load * 0, lower_bound=split.lower_bound * 0)
    assert metrics.gap(nothing).tolist() == [0, 0]


def test_an_even_split_loses_no_token_to_a_traced_logcnt(rng):
    """Only log2phy determines how many slots an expert has."""
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    loads = rng.integers(0, 1000, case.n_logical).astype(np.int32)
    expected = metrics.even_quota(loads, placement)
    wrong = dataclasses.replace(placement, logcnt=placement.logcnt * 0)
    np.testing.assert_array_equal(jax.jit(metrics.even_quota)(loads, wrong), expected)


def test_balancing_beats_an_even_split(rng):
    """The README's table, as inequalities."""
    case = CASES["cube"](rng)
    placement = case.placement(rng)
    loads = rng.lognormal(5, 1.2, case.n_logical).astype(np.int32)
    split = solve(loads, case.r2o, placement=placement)

    def largest(quota):
        return int(metrics.rank_loads(quota, 8).max())

    assert largest(split.quota) == split.max_load[0]
    assert largest(split.quota) <= largest(metrics.even_quota(loads, placement))
    assert largest(split.quota) <= largest(metrics.home_quota(loads, placement))


def test_experts_fetched_and_homes_moved(rng):
    """Against sets of experts by rank, for tables with duplicates and empty slots, and layers."""
    case = any_cases.SIZES["5 x 7"]
    tables = np.stack([[case.phy2log(rng) for _ in range(3)] for _ in range(2)])
    old, new = (
        Placement.from_phy2log(table.reshape(3, 5, 7), ep_size=5, n_logical=11) for table in tables
    )
    fetched, moved = jax.jit(metrics.experts_fetched)(old, new), metrics.homes_moved(old, new)
    for layer in range(3):
        ranks = [[set(row) - {-1} for row in table[layer].reshape(5, 7)] for table in tables]
        expected = [len(has - had) for had, has in zip(*ranks, strict=True)]
        assert fetched[layer].tolist() == expected
        homes = [one.log2phy[layer, :, 0] // 7 for one in (old, new)]
        assert int(moved[layer]) == sum(a != b for a, b in zip(*homes, strict=True))
        pair = [jax.tree.map(lambda array, i=layer: array[i], one) for one in (old, new)]
        assert metrics.experts_fetched(*pair).tolist() == expected
    assert not metrics.experts_fetched(old, old).any()
    assert not metrics.homes_moved(new, new).any()


def test_experts_fetched_into_other_slots():
    """Slots may be more or fewer; other experts, ranks or layers are refused."""
    old = Placement.from_phy2log([[0, 1], [2, 3]], ep_size=2)
    new = Placement.from_phy2log([[0, 1, 2], [2, 3, 0]], ep_size=2)
    assert metrics.experts_fetched(old, new).tolist() == [1, 1]
    assert metrics.experts_fetched(new, old).tolist() == [0, 0]
    for function in (metrics.experts_fetched, metrics.homes_moved):
        with pytest.raises(ValueError, match=r"^new: expected .* \[4, 2\] as old has, got \[3, 2"):
            function(old, Placement.from_phy2log([[0, 1], [2, -1]], ep_size=2))
        with pytest.raises(ValueError, match=r"^new: expected .* \[4, 2\] .* got \[1, 4, 2\]"):
            function(old, jax.tree.map(lambda array: array[None], new))
        with pytest.raises(TypeError, match=r"^old: expected a lplb_jax.Placement, got list"):
            function([0], new)
