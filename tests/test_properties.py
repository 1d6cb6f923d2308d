"""Property-based tests: hypothesis searches for violations of the guarantees."""

import functools

import numpy as np
from cases import INT32_MAX, Case, counts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import (
    assert_feasible,
    assert_hosted,
    assert_positions,
    assign_slowly,
    best_cut,
    group_views,
    proportional_keep,
    tokens_at_slots,
)
from steps import (
    assert_same,
    native_assign,
    native_count,
    native_rebalance,
    native_solve,
    repeated,
    spec_assign,
    spec_count,
    spec_rebalance,
    spec_solve,
)

from lplb_jax import Split, place_experts, rebalance, topologies

# Few shapes, so that most examples are already compiled: ranks, columns, n_local, groups, combined.
SHAPES = [(1, 1, 1, 2, 1), (3, 2, 2, 1, 1), (4, 1, 2, 2, 2), (5, 3, 6, 1, 2)]


@st.composite
def problems(draw):
    """Any r2o whose columns are permutations, any order of the experts."""
    n_ranks, n_columns, n_local, n_groups, combined = draw(st.sampled_from(SHAPES))
    columns = [draw(st.permutations(range(n_ranks))) for _ in range(n_columns)]
    case = Case(np.array(columns, np.int32).T, n_local, n_groups, combined)
    order = draw(st.permutations(range(case.n_logical)))
    per_rank = np.array(order).reshape(case.ep_size, n_local)
    # Loads that make the packing give exactly this order: lighter in later local places.
    history = np.empty(case.n_logical)
    history[per_rank] = 2.0 ** -np.arange(n_local)
    placement = place_experts(
        history,
        case.r2o,
        n_logical=case.n_logical,
        ep_size=case.ep_size,
        redundants_per_rank=case.redundants_per_rank,
    )
    return case, placement


def loads_of(case):
    """Small loads, or loads of all sizes such that every rank's possible sum still fits."""
    most = INT32_MAX // (case.n_local + case.redundants_per_rank)
    return st.one_of(
        hnp.arrays(np.int32, case.n_logical, elements=st.integers(0, 5)),
        hnp.arrays(np.int32, case.n_logical, elements=st.integers(0, most)),
    )


@settings(max_examples=40)
@given(st.data())
def test_solve_is_optimal_and_equals_its_specification(data):
    case, placement = data.draw(problems())
    loads = data.draw(loads_of(case))
    operands = repeated((loads[None], case.r2o, placement), 1)
    results = native_solve(*operands)
    assert_same(results, spec_solve(*operands))
    split = Split(*(result[0] for result in results))
    assert_feasible(loads, split, case, placement)
    for g, view in enumerate(group_views(loads, case, placement)):
        assert split.max_load[g] == split.lower_bound[g] == best_cut(*view)


@settings(max_examples=40)
@given(st.data())
def test_solve_takes_any_loads(data):
    """Also negative or too large loads: the same bits, and the load conserved or clipped."""
    case, placement = data.draw(problems())
    loads = data.draw(hnp.arrays(np.int32, (case.ep_size, case.n_logical)))
    operands = repeated((loads, case.r2o, placement), 1)
    results = native_solve(*operands)
    assert_same(results, spec_solve(*operands))
    quota = np.asarray(results[0][0])
    assert (quota >= 0).all()
    served = np.zeros(case.n_logical, np.int64)
    np.add.at(served, placement.phy2log, quota)
    total = loads.clip(0).astype(np.int64).sum(axis=0)
    np.testing.assert_array_equal(served, total.clip(None, INT32_MAX))


@settings(max_examples=40)
@given(st.data())
def test_rebalance_is_exact_to_the_token(data):
    case, placement = data.draw(problems())
    ids = st.integers(-1, case.n_logical - 1)
    indices = data.draw(hnp.arrays(np.int32, (case.ep_size, 12), elements=ids))
    loads = counts_of(indices, case.n_logical)
    physical, split = rebalance(indices, loads, case.r2o, placement=placement)
    assert_hosted(indices, physical, placement)
    np.testing.assert_array_equal(tokens_at_slots(physical, placement.n_physical), split.quota)
    np.testing.assert_array_equal(physical, assign_slowly(indices, split.quota, case, placement))


@settings(max_examples=40)
@given(st.data())
def test_rebalance_alone_equals_its_specification(data):
    """All steps in one call, ids of all kinds, and the place of every token in its slot's list."""
    case, placement = data.draw(problems())
    ids = st.integers(-2, case.n_logical)
    indices = data.draw(hnp.arrays(np.int32, 24, elements=ids))
    operands = repeated((indices, case.r2o, placement), 1)
    assigned, split = native_rebalance(*operands)
    assert_same((assigned, split), spec_rebalance(*operands))
    assert_positions(*assigned)
    np.testing.assert_array_equal(assigned.counts, split.quota)


@settings(max_examples=100)
@given(st.data())
def test_assign_takes_any_quota_and_counts(data):
    case, placement = data.draw(problems())
    ids = hnp.arrays(np.int32, (case.ep_size, 12), elements=st.integers(-2, case.n_logical))
    indices = data.draw(ids)
    counts = data.draw(hnp.arrays(np.int32, (case.ep_size, case.n_logical)))
    elements = st.integers(0, INT32_MAX // 2)
    quota = data.draw(hnp.arrays(np.int32, placement.n_physical, elements=elements))
    operands = repeated((indices, counts, quota, placement), 1)
    for proportional in (False, True):
        assigned = native_assign(*operands, proportional=proportional)
        assert_same(assigned, spec_assign(*operands, proportional=proportional))
        assert_hosted(indices, assigned.physical_indices[0], placement)
        assert_positions(*assigned)


@settings(max_examples=200)
@given(
    st.integers(0, INT32_MAX),
    st.integers(0, INT32_MAX).flatmap(lambda load: st.tuples(st.just(load), st.integers(0, load))),
    st.sampled_from([(2, 0), (2, 1)]),
)
def test_proportional_share(count, load_and_stay, source):
    """Whether the token of a source with this count stays, by Python's integers."""
    load, stay = load_and_stay
    ep_size, rank = source
    placement = _ring_of_two()
    quota = np.array([stay, 0, 0, load - stay], np.int32)
    counts = np.array([[count, 0]] * 2, np.int32)
    indices = np.zeros((2, 1), np.int32)
    operands = repeated((indices, counts, quota, placement), 1)
    physical = native_assign(*operands, proportional=True).physical_indices
    keep = proportional_keep(count, stay, load, rank, ep_size)
    assert 0 <= keep <= count
    assert physical[0, rank, 0] == (0 if keep > 0 else 3)


@functools.cache
def _ring_of_two():
    return Case(topologies.ring(2), 1).placement()


@settings(max_examples=40)
@given(hnp.arrays(np.int32, st.sampled_from([0, 1, 9, 33])), st.sampled_from([1, 5]))
def test_count_takes_any_ids(ids, n_logical):
    counts = native_count(ids, n_logical)
    assert_same(counts, spec_count(ids, n_logical))
    expected = [int((ids == e).sum()) for e in range(n_logical)]
    invalid = int(((ids < -1) | (ids >= n_logical)).sum())
    assert counts.tolist() == [*expected, invalid]


@given(st.data())
def test_place_experts_takes_any_history(data):
    n_nodes, per_node, n_local = (data.draw(st.integers(1, 4)) for _ in range(3))
    ep_size = max(2, n_nodes * per_node)
    n_nodes = n_nodes if ep_size % n_nodes == 0 else 1
    n_logical = ep_size * n_local
    elements = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e30))
    history = data.draw(hnp.arrays(np.float64, n_logical, elements=elements))
    placement = place_experts(
        history,
        topologies.ring(ep_size),
        n_logical=n_logical,
        ep_size=ep_size,
        redundants_per_rank=data.draw(st.integers(1, n_local)),
        n_nodes=n_nodes,
    )
    own = placement.phy2log.reshape(ep_size, -1)[:, :n_local]
    assert sorted(own.ravel()) == list(range(n_logical))
    assert (np.diff(history[own], axis=1) <= 0).all()
