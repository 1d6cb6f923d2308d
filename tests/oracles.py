"""Independent oracles: HiGHS, all subsets, slow Python."""

from __future__ import annotations

import jax
import numpy as np
import scipy.optimize
import scipy.sparse
from cases import Case

from lplb_jax import Placement, Split

Values = np.ndarray | jax.Array


def slots_of(placement: Placement) -> list[list[int]]:
    """The slots of every expert, from phy2log alone, in the order of the slots."""
    slots: list[list[int]] = [[] for _ in range(placement.n_logical)]
    for slot, expert in enumerate(np.asarray(placement.phy2log)):
        slots[expert].append(slot)
    return slots


def host_matrix(placement: Placement) -> np.ndarray:
    """Whether rank r hosts expert e, bool `[n_logical, ep_size]`."""
    hosts = np.zeros((placement.n_logical, placement.ep_size), bool)
    rank = np.arange(placement.n_physical) // (placement.n_physical // placement.ep_size)
    slot = np.flatnonzero(np.asarray(placement.phy2log) >= 0)
    hosts[np.asarray(placement.phy2log)[slot], rank[slot]] = True
    return hosts


def cut_bounds(loads: np.ndarray, hosts: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """⌈load whose hosts all lie in S / |S|⌉ for every S in bool `[n_subsets, n_ranks]`, exactly."""
    stays = ~(subsets[:, None, :] < hosts[None]).any(axis=2)
    load = (stays * loads.astype(np.int64)).sum(axis=1)
    return -(-load // subsets.sum(axis=1))


def best_cut(loads: np.ndarray, hosts: np.ndarray) -> int:
    """The largest bound over all non-empty sets of ranks: the integer optimum, for few ranks."""
    return int(cut_bounds(loads, hosts, every_subset(hosts.shape[1])).max())


def linear_program(
    loads: np.ndarray, hosts: np.ndarray, weights: np.ndarray | float = 1.0
) -> tuple[float, np.ndarray]:
    """HiGHS: the least largest load / weight of a fractional split, and the ranks' dual values."""
    expert, rank = np.nonzero(hosts)
    n_pairs, n_ranks = len(expert), hosts.shape[1]
    scale = max(1.0, float(loads.max()))
    pair = np.arange(n_pairs)
    below = scipy.sparse.coo_array(
        (
            np.append(np.ones(n_pairs), np.broadcast_to(-np.asarray(weights), n_ranks)),
            (np.append(rank, np.arange(n_ranks)), np.append(pair, np.full(n_ranks, n_pairs))),
        )
    )
    served = scipy.sparse.coo_array(
        (np.ones(n_pairs), (expert, pair)), shape=(len(loads), n_pairs + 1)
    )
    solved = scipy.optimize.linprog(
        np.append(np.zeros(n_pairs), 1),
        A_ub=below.tocsr(),
        b_ub=np.zeros(n_ranks),
        A_eq=served.tocsr(),
        b_eq=loads / scale,
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solved.status == 0, solved.message
    return solved.fun * scale, -solved.ineqlin.marginals


def every_subset(n_ranks: int) -> np.ndarray:
    """All non-empty sets of ranks, bool `[2ⁿ − 1, n_ranks]`."""
    return (np.arange(1, 1 << n_ranks)[:, None] >> np.arange(n_ranks) & 1).astype(bool)


def weighted_optimum(
    loads: np.ndarray, hosts: np.ndarray, weights: np.ndarray, subsets: np.ndarray | None = None
) -> float:
    """The minimal largest load / weight, of whole tokens if `loads` are integers.

    Max-flow min-cut: a split exists if no set of ranks must keep more than its limit. Sums are
    float64 of terms ≥ 0, so loads and weights can have any size; `subsets` are all sets that could
    matter, by default all subsets.
    """
    subsets = every_subset(hosts.shape[1]) if subsets is None else subsets
    stays = ~(subsets[:, None, :] < hosts[None]).any(axis=2)
    kept = stays @ loads.astype(np.float64)
    real = float((kept / (subsets @ weights)).max())
    if not np.issubdtype(loads.dtype, np.integer) or real == 0:
        return real
    low, high = real, float(((kept + hosts.shape[1]) / (subsets @ weights)).max())
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        allowed = np.floor(middle * weights * (1 + 1e-12))
        low, high = (middle, high) if (subsets @ allowed < kept).any() else (low, middle)
    return high


def optimum(loads: np.ndarray, hosts: np.ndarray) -> int:
    """The minimal integer largest load, proven by the set that HiGHS's dual values give.

    Some level set {rank: y ≥ θ} of the optimal dual solution is a best cut. Its bound is computed
    in integers, so the solver's float tolerance does not enter.
    """
    value, dual = linear_program(loads, hosts)
    levels = dual[:, None] >= np.unique(dual)[None]
    bound = int(cut_bounds(loads, hosts, levels.T).max())
    # Otherwise the dual solution was too inaccurate, and the bound proves nothing.
    assert bound - 1 - 1e-6 * bound - 1e-3 <= value <= bound * (1 + 1e-6) + 1e-3
    return bound


def group_views(loads: np.ndarray, case: Case, placement: Placement):
    """Loads and hosts of each group."""
    hosts = host_matrix(placement).reshape(case.n_logical, case.n_groups, -1)
    for g in range(case.n_groups):
        mine = hosts[:, g].any(axis=1)
        assert not hosts[mine][:, np.arange(case.n_groups) != g].any(), "expert in two groups"
        yield loads[mine], hosts[mine, g]


def assert_feasible(loads: np.ndarray, split: Split, case: Case, placement: Placement) -> None:
    """Every token is served once, by a slot that holds its expert, and max_load is correct."""
    quota = np.asarray(split.quota)
    assert quota.dtype == np.int32
    assert quota.shape == (placement.n_physical,)
    assert (quota >= 0).all()
    served = np.zeros(case.n_logical, np.int64)
    np.add.at(served, np.asarray(placement.phy2log), quota)
    np.testing.assert_array_equal(served, loads)
    ranks = quota.reshape(case.n_groups, len(case.r2o), -1).astype(np.int64).sum(axis=2)
    np.testing.assert_array_equal(split.max_load, ranks.max(axis=1))
    copies_itself = (np.asarray(case.r2o) == np.arange(len(case.r2o))[:, None])[:, :, None]
    columns = quota.reshape(case.n_groups, len(case.r2o), -1)[:, :, case.n_local :]
    columns = columns.reshape(case.n_groups, len(case.r2o), case.combined, -1).swapaxes(2, 3)
    assert not (columns * copies_itself).any(), "a rank's copy of its own expert is used"


def assert_optimal(loads: np.ndarray, split: Split, case: Case, placement: Placement) -> None:
    """The split is optimal, by HiGHS and, for few ranks, by all cuts."""
    for g, (group_loads, hosts) in enumerate(group_views(loads, case, placement)):
        best = optimum(group_loads, hosts)
        if hosts.shape[1] <= 8:
            assert best == best_cut(group_loads, hosts)
        assert int(split.max_load[g]) == best
        assert int(split.lower_bound[g]) == best
        assert int(split.status[g]) == 0


def assign_slowly(
    indices: np.ndarray, quota: Values, case: Case, placement: Placement
) -> np.ndarray:
    """Assigns token by token: the home rank's first, then by source, the replica's rank last."""
    slots_per_rank = placement.n_physical // placement.ep_size
    physical = np.full(indices.shape, -1)
    for expert, slots in enumerate(slots_of(placement)):
        own = [p for p in slots if p % slots_per_rank < case.n_local]
        copy = [p for p in slots if p % slots_per_rank >= case.n_local]
        assert len(own) == 1
        assert len(copy) <= 1
        home = own[0] // slots_per_rank
        replica = copy[0] // slots_per_rank if copy else home
        sources = [s for s in range(len(indices)) if s not in (home, replica)]
        sources = [home, *sources] + ([replica] if replica != home else [])
        left = int(quota[own[0]])
        for source in sources if len(indices) > 1 else [0]:
            for i in np.flatnonzero(indices[source] == expert):
                physical[source, i] = own[0] if left > 0 or not copy else copy[0]
                left -= 1
    return physical


def proportional_keep(count: int, stay: int, load: int, rank: int, ep_size: int) -> int:
    """How many of `count` tokens stay: the exact share, rounded with an offset by rank."""
    if load == 0:
        return count
    offset = load * (2 * rank + 1) // (2 * ep_size)
    return (count * stay + offset) // load


def tokens_at_slots(physical: Values, n_physical: int) -> np.ndarray:
    """Tokens per slot."""
    slots = np.asarray(physical).reshape(-1)
    return np.bincount(slots[slots >= 0], minlength=n_physical)


def assert_hosted(indices: Values, physical: Values, placement: Placement) -> None:
    """Every token is in a slot that holds its expert; tokens without an expert are in none."""
    experts, slots = np.asarray(indices).astype(np.int64), np.asarray(physical)
    known = (experts >= 0) & (experts < placement.n_logical)
    np.testing.assert_array_equal(slots[~known], -1)
    np.testing.assert_array_equal(np.asarray(placement.phy2log)[slots[known]], experts[known])


def assert_positions(physical: Values, position: Values, counts: Values) -> None:
    """In each row, a slot's tokens are numbered 0, 1, … in order, and counted."""
    rows = np.asarray(physical).reshape(-1, np.shape(physical)[-1])
    of_rows = np.asarray(position).reshape(rows.shape), np.asarray(counts).reshape(len(rows), -1)
    for slots, places, lengths in zip(rows, *of_rows, strict=True):
        assert (places[slots < 0] == -1).all()
        order = np.argsort(slots, kind="stable")[(slots < 0).sum() :]
        np.testing.assert_array_equal(lengths, tokens_at_slots(slots, len(lengths)))
        expected = [place for length in lengths for place in range(length)]
        np.testing.assert_array_equal(places[order], expected)
