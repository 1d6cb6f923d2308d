"""verify() against all subsets and HiGHS: it accepts correct results, and names each fault."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FAMILIES, INT32_MAX, Case
from oracles import best_cut, group_views, optimum

from lplb_jax import Placement, Split, rebalance, solve, topologies, verify
from lplb_jax.certificate import fewest_possible


def hosted(rng, n_experts, n_ranks):
    """Any placement: every expert on one rank or several."""
    return [
        sorted(rng.choice(n_ranks, rng.integers(1, n_ranks + 1), replace=False).tolist())
        if rng.random() < 0.4
        else [int(rng.integers(n_ranks))]
        for _ in range(n_experts)
    ]


def as_matrix(hosts, n_ranks):
    matrix = np.zeros((len(hosts), n_ranks), bool)
    for expert, ranks in enumerate(hosts):
        matrix[expert, ranks] = True
    return matrix


@pytest.mark.parametrize("n_ranks", [1, 2, 5, 8])
def test_the_fewest_possible_is_the_largest_cut(rng, n_ranks):
    for _ in range(40):
        hosts = hosted(rng, int(rng.integers(1, 4 * n_ranks + 1)), n_ranks)
        most = int(rng.choice([3, 1000, INT32_MAX]))
        loads = rng.integers(0, most + 1, len(hosts))
        fewest, proof = fewest_possible(loads.tolist(), hosts, range(n_ranks))
        matrix = as_matrix(hosts, n_ranks)
        assert fewest == best_cut(loads, matrix)
        confined = loads[~matrix[:, np.setdiff1d(range(n_ranks), proof)].any(axis=1)].sum()
        assert fewest == -(-int(confined) // len(proof))


@pytest.mark.parametrize("n_ranks", [16, 48])
def test_the_fewest_possible_is_what_highs_finds(rng, n_ranks):
    for _ in range(5):
        hosts = hosted(rng, 4 * n_ranks, n_ranks)
        loads = rng.lognormal(4, 1.5, len(hosts)).astype(np.int64)
        fewest, _ = fewest_possible(loads.tolist(), hosts, range(n_ranks))
        assert fewest == optimum(loads, as_matrix(hosts, n_ranks))


def instance(rng, name):
    case = CASES[name](rng)
    placement = case.placement(rng)
    family = FAMILIES[rng.integers(len(FAMILIES))]
    return case, placement, np.asarray(family(rng, case, placement)).astype(np.int32)


@pytest.mark.parametrize("name", CASES)
def test_the_exact_solver_passes(rng, name):
    case, placement, loads = instance(rng, name)
    split = solve(loads, placement=placement)
    assert verify(loads, split, placement=placement) == []
    bare = dataclasses.replace(placement, topology=None)
    assert verify(loads, split, np.asarray(case.r2o), placement=bare) == []


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_indices_of_every_type(rng, dtype):
    """Also unsigned ones, in which no expert is a large number."""
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    ids = rng.integers(0, case.n_logical, (case.ep_size, 99)).astype(dtype)
    physical, split = rebalance(ids, None, placement=placement)
    where = {"physical_indices": physical, "placement": placement}
    assert verify(None, split, indices=ids, **where) == []
    assert verify(None, split, indices=ids + dtype(1), **where)
    ids = np.where(rng.random(ids.shape) < 0.1, np.array(-1).astype(dtype), ids)
    physical, split = rebalance(ids, None, placement=placement)
    where = {"physical_indices": physical, "placement": placement}
    assert verify(None, split, indices=ids, **where) == []


def test_what_it_accepts(rng):
    case = Case(topologies.cube(), 4, n_groups=2, combined=2)
    placement = case.placement(rng)
    ids = rng.integers(-1, case.n_logical, (case.ep_size, 99)).astype(np.int32)
    physical, split = rebalance(ids, None, placement=placement)
    routed = {"placement": placement, "indices": ids, "physical_indices": physical}
    counts = np.stack([np.bincount(row[row >= 0], minlength=case.n_logical) for row in ids])
    assert verify(None, split, **routed) == []
    assert verify(counts, split, **routed) == []
    assert verify(counts.sum(axis=0).tolist(), split, case.r2o, **routed) == []
    on_device = jax.tree.map(jnp.asarray, (split, placement))
    assert verify(jnp.asarray(counts), on_device[0], placement=on_device[1]) == []
    loads = rng.integers(0, 99, case.n_logical // 2).astype(np.int32)
    assert verify(loads, solve(loads, topologies.cube()), topologies.cube()) == []


@pytest.mark.parametrize("name", ["ring 8", "cube, three groups", "random 16x8"])
def test_quotas_of_another_split(rng, name):
    """Everything at home is feasible; all subsets or HiGHS decide whether it is optimal."""
    case, placement, loads = instance(rng, name)
    split = solve(loads, placement=placement)
    quota = np.zeros_like(placement.phy2log)
    quota[placement.log2phy[:, 0]] = loads
    ranks = quota.reshape(case.n_groups, len(case.r2o), -1).sum(axis=2, dtype=np.int64)
    home = split._replace(quota=quota, max_load=ranks.max(axis=1))
    expected = []
    for group, (mine, hosts) in enumerate(group_views(loads, case, placement)):
        best = optimum(mine, hosts)
        if ranks[group].max() != best:
            words = f"has {ranks[group].max():,} tokens, {best:,} are possible"
            expected.append(f"group {group}: the busiest rank {words}")
    assert verify(loads, home, placement=placement) == expected


@pytest.fixture
def solved(rng):
    case = Case(topologies.cube(), 4, combined=2)
    placement = case.placement(rng)
    ids = rng.integers(0, case.n_logical, (8, 200)).astype(np.int32)
    physical, split = jax.tree.map(np.asarray, rebalance(ids, None, placement=placement))
    return ids, physical, split, placement


def test_every_fault_is_named(solved):
    ids, _, split, placement = solved
    loads = np.bincount(ids.ravel(), minlength=placement.n_logical)
    served = np.flatnonzero(split.quota)

    def faults(**change):
        return verify(loads, split._replace(**change), placement=placement)

    less = split.quota.copy()
    less[served[0]] -= 1
    expert = placement.phy2log[served[0]]
    assert faults(quota=less)[0] == (
        f"expert {expert} has {loads[expert]:,} tokens, the quotas of its slots sum to "
        f"{loads[expert] - 1:,}"
    )
    negative = split.quota.copy()
    negative[3] = -5
    assert faults(quota=negative)[0] == "slot 3 has a quota of -5, expected at least 0"
    best = int(split.max_load[0])
    assert faults(status=split.status + 16) == [
        "group 0: status is <Status.NOT_CONVERGED: 16>, expected 0"
    ]
    assert faults(max_load=split.max_load - 1) == [
        f"group 0: max_load is {best - 1:,}, the busiest rank's quotas sum to {best:,}"
    ]
    (fault,) = faults(lower_bound=split.lower_bound - 1)
    assert fault.startswith(f"group 0: lower_bound is {best - 1:,}, ranks [")
    assert fault.endswith(f"] prove {best:,}")


def test_every_fault_of_the_routing_is_named(solved):
    ids, physical, split, placement = solved

    def faults(slots):
        return verify(
            None, split, placement=placement, indices=ids, physical_indices=slots.reshape(8, -1)
        )

    assert faults(physical) == []
    wrong = physical.ravel().copy()
    i, j = 0, int(np.flatnonzero(ids.ravel() != ids[0, 0])[0])
    wrong[[i, j]] = wrong[[j, i]]
    assert faults(wrong) == ["2 tokens were sent to a slot without their expert"]
    for nowhere in (-1, -7, placement.n_physical):
        lost = physical.ravel().copy()
        lost[5] = nowhere
        assert faults(lost) == [
            "1 tokens were sent to a slot without their expert",
            "1 slots got another number of tokens than their quota",
        ]


def test_any_placement(rng):
    """Slots hold any experts, some twice on a rank, some none: judged by phy2log alone."""
    n_logical, ep_size, slots_per_rank = 9, 4, 4
    for _ in range(20):
        spare = rng.integers(-1, n_logical, ep_size * slots_per_rank - n_logical)
        phy2log = rng.permutation(np.append(np.arange(n_logical), spare)).astype(np.int32)
        placement = Placement.from_phy2log(phy2log, ep_size=ep_size, n_logical=n_logical)
        loads = rng.integers(0, 100, n_logical).astype(np.int32)
        best = best_cut(loads, any_hosts(placement))
        split = solve(loads, placement=placement)
        assert split.max_load.tolist() == [best]
        assert verify(loads, split, placement=placement) == []
        quota = np.zeros(16, np.int32)
        quota[placement.log2phy[:, 0]] = loads
        busiest = int(quota.reshape(ep_size, -1).sum(axis=1).max())
        split = Split(quota, np.array([busiest]), np.array([best]), np.array([0]))
        better = f"group 0: the busiest rank has {busiest:,} tokens, {best:,} are possible"
        assert verify(loads, split, placement=placement) == ([better] if busiest > best else [])


def any_hosts(placement):
    """`host_matrix` where slots may be empty."""
    held = placement.phy2log >= 0
    hosts = np.zeros((placement.n_logical, placement.ep_size), bool)
    hosts[placement.phy2log[held], np.flatnonzero(held) * placement.ep_size // len(held)] = True
    return hosts


def test_an_empty_slot_serves_nobody():
    placement = Placement.from_phy2log([0, -1, 1, -1], ep_size=2)
    split = Split(np.array([3, 1, 4, 0]), np.array([4]), np.array([4]), np.array([0]))
    assert verify([3, 4], split, placement=placement) == [
        "slot 1 is empty and has a quota of 1, expected 0"
    ]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loads": np.ones(32)}, TypeError, "^loads: expected integers, got dtype float64"),
        ({"loads": np.ones(31, int)}, ValueError, r"^loads: expected shape .*got \[31\]"),
        ({"loads": None}, ValueError, "^loads: expected integers, got None"),
        ({"split": None}, TypeError, "^split: expected a Split, got NoneType"),
        ({"r2o": topologies.ring(8)}, ValueError, "^r2o: expected placement.topology"),
        ({"indices": np.zeros(3, int)}, ValueError, "^physical_indices: expected the slots"),
        (
            {"indices": np.zeros(3, int), "physical_indices": np.zeros(2, int)},
            ValueError,
            r"^physical_indices: expected the shape of indices, \[3\], got \[2\]",
        ),
    ],
)
def test_bad_arguments(solved, change, error, words):
    ids, _, split, placement = solved
    loads = np.bincount(ids.ravel(), minlength=placement.n_logical)
    with pytest.raises(error, match=words):
        verify(**{"loads": loads, "split": split, "placement": placement, **change})


def test_bad_splits(solved):
    ids, _, split, placement = solved
    loads = np.bincount(ids.ravel(), minlength=placement.n_logical)
    for name in Split._fields:
        with pytest.raises(ValueError, match=rf"^split.{name}: expected shape \[\d+\], got"):
            verify(loads, split._replace(**{name: np.zeros(7, int)}), placement=placement)
        with pytest.raises(TypeError, match=rf"^split.{name}: expected integers, got dtype fl"):
            verify(loads, split._replace(**{name: np.zeros(7)}), placement=placement)
    with pytest.raises(TypeError, match=r"^loads: .*known on the host, got a traced value"):
        jax.jit(lambda loads: verify(loads, split, placement=placement))(loads)
