"""place_experts without a topology: valid, with even homes, and as good as its alternatives."""

from typing import Any

import jax
import numpy as np
import pytest

from lplb_jax import Placement, place_experts, solve
from lplb_jax._portfolio import Sizes, with_even_homes

# n_logical, ranks, redundant slots per rank, nodes
SIZES = {
    "one expert": (1, 1, 0, 1),
    "no copies": (16, 4, 0, 2),
    "one rank": (5, 1, 3, 1),
    "few experts": (3, 8, 1, 2),
    "more slots than copies": (4, 4, 5, 1),
    "not divisible": (60, 16, 2, 4),
    "a prime number": (61, 7, 1, 1),
    "8 ranks": (64, 8, 2, 2),
    "12 ranks": (48, 12, 4, 3),
    "64 ranks": (256, 64, 1, 8),
}


def history_for(rng, n_logical, n_batches):
    """Batches of tokens with a random kind of skew."""
    kind = rng.integers(4)
    loads = [
        np.ones(n_logical),
        rng.lognormal(0, 1.5, n_logical),
        rng.permutation(np.arange(1, n_logical + 1) ** -1.5),
        np.where(np.arange(n_logical) == rng.integers(n_logical), 0.3 * n_logical, 1),
    ][kind]
    p = loads * rng.lognormal(0, 0.3, (n_batches, n_logical))
    return np.stack([rng.multinomial(100_000, row / row.sum()) for row in p])


def sizes_of(case):
    names = ("n_logical", "ep_size", "redundants_per_rank", "n_nodes")
    return dict(zip(names, SIZES[case], strict=True))


def imbalance(placement: Placement, batches) -> float:
    """Largest over mean rank load, balanced exactly, averaged over batches."""
    loads = np.asarray(batches, np.int32)
    splits = [solve(batch, None, placement=placement) for batch in loads]
    most = np.array([int(split.max_load[0]) for split in splits])
    return float(np.mean(most * placement.ep_size / loads.sum(axis=1)))


def check_legal(placement: Placement, n_logical, ep_size, redundants_per_rank, n_nodes):
    n_local = -(-n_logical // ep_size)
    ranks = placement.phy2log.reshape(ep_size, n_local + redundants_per_rank)
    assert (placement.topology, placement.n_nodes) == (None, n_nodes)
    assert placement.phy2log.dtype == placement.log2phy.dtype == np.int32
    np.testing.assert_array_equal(np.unique(ranks[ranks >= 0]), np.arange(n_logical))
    if np.any(ranks < 0):
        assert (placement.logcnt == ep_size).all(), "a slot is empty that could hold a copy"
    at_home = np.bincount(placement.log2phy[:, 0] // ranks.shape[1], minlength=ep_size)
    assert at_home.max() <= n_local
    for expert, slots in enumerate(placement.log2phy):
        hosting = np.flatnonzero(placement.phy2log == expert)
        assert placement.logcnt[expert] == len(hosting)
        assert sorted(slots[slots >= 0]) == list(hosting)


@pytest.mark.parametrize("case", SIZES)
def test_legal_with_even_homes(rng, case):
    sizes = sizes_of(case)
    for n_batches in (1, 3):
        history = history_for(rng, sizes["n_logical"], n_batches)
        placement = place_experts(history[None], **sizes)
        check_legal(jax.tree.map(lambda array: array[0], placement), **sizes)


@pytest.mark.parametrize("case", SIZES)
def test_the_solver_takes_it(rng, case):
    """`solve` checks a placement's tables, in the order of homes and ranks as well."""
    sizes = sizes_of(case)
    history = history_for(rng, sizes["n_logical"], 1)[0]
    split = solve(history.astype(np.int32), None, placement=place_experts(history, **sizes))
    assert split.status.tolist() == [0]


def test_homes_are_first_slots(rng):
    """A rank's second slot of an expert would not be used. Rank 0 has too many homes in any case,
    which leaves other ranks uneven as well, so that experts move to where they have copies."""
    sizes = Sizes(n_logical=12, ep_size=4, slots_per_rank=5)
    for _ in range(50):
        others = rng.permutation(np.append(np.arange(5, 12), rng.integers(5, 12, 8)))
        given = np.append(np.arange(5), others).astype(np.int32)
        table = with_even_homes(given, rng.lognormal(0, 2, 12), sizes)
        np.testing.assert_array_equal(table.phy2log[table.homes], np.arange(12))
        rank, slot = np.divmod(table.homes, sizes.slots_per_rank)
        np.testing.assert_array_equal(np.bincount(rank), [3, 3, 3, 3])
        on_rank = table.phy2log.reshape(4, 5)[rank] == np.arange(12)[:, None]
        np.testing.assert_array_equal(slot, on_rank.argmax(axis=1))


def check_never_worse_than_eplb(history, sizes):
    placements = [
        jax.tree.map(lambda array: array[0], place_experts(history[None], **sizes, method=method))
        for method in ("auto", "eplb")
    ]
    ours, eplb = (imbalance(placement, history) for placement in placements)
    # place_experts scales batches to 2⁴⁰ tokens: a token of these batches is a fraction there.
    assert ours <= eplb + 1e-4


@pytest.mark.parametrize("case", SIZES)
def test_never_worse_than_eplb_on_the_history(rng, case):
    sizes = sizes_of(case)
    for _ in range(3):
        history = history_for(rng, sizes["n_logical"], rng.integers(1, 5))
        check_never_worse_than_eplb(history, sizes)


@pytest.mark.parametrize("seed", [300, 847])
def test_never_worse_than_eplb_whose_homes_are_uneven(seed):
    """One history in some 200: EPLB's table, and every other with even homes, is worse than it."""
    history = history_for(np.random.default_rng(seed), 256, 4)
    check_never_worse_than_eplb(history, sizes_of("64 ranks"))


def test_many_copies_of_a_hot_expert(rng):
    """45 times the mean load: no topology helps, and an even split of the copies is 1.2 or more."""
    loads = rng.lognormal(0, 0.5, 256)
    loads[rng.integers(256)] = 45 * loads.mean()
    history = rng.multinomial(1_000_000, loads / loads.sum())
    placement = place_experts(history, n_logical=256, ep_size=64, redundants_per_rank=2)
    assert imbalance(placement, history[None]) <= 1.01


def test_layers_and_batches(rng):
    history = np.stack([history_for(rng, 24, 5) for _ in range(3)])
    sizes: dict[str, Any] = {"n_logical": 24, "ep_size": 8, "redundants_per_rank": 1}
    stacked = place_experts(history, **sizes)
    assert stacked.phy2log.shape == (3, 32)
    for layer, batches in enumerate(history):
        of_stack = jax.tree.map(lambda array, layer=layer: array[layer], stacked)
        alone = jax.tree.map(lambda array: array[0], place_experts(batches[None], **sizes))
        jax.tree.map(np.testing.assert_array_equal, of_stack, alone)
    one_each = place_experts(history[:, 0], **sizes)
    jax.tree.map(np.testing.assert_array_equal, one_each, place_experts(history[:, :1], **sizes))
    jax.tree.map(
        np.testing.assert_array_equal,
        place_experts(history[1, 0], **sizes),
        jax.tree.map(lambda array: array[1], one_each),
    )


def test_deterministic_and_free_of_units(rng):
    history = history_for(rng, 64, 1)[0]
    sizes = sizes_of("8 ranks")
    np.random.seed(rng.integers(2**31))  # noqa: NPY002 - a state that must not matter
    for method in ("auto", "eplb"):
        placements = [
            place_experts(history * unit, **sizes, method=method)
            for unit in (1, 1, 2.0**-60, 2.0**80, 2.0**-900, 2.0**900)
        ]
        for placement in placements[1:]:
            jax.tree.map(np.testing.assert_array_equal, placement, placements[0])


@pytest.mark.parametrize("history", [None, np.zeros(64), np.zeros((1, 3, 64))])
def test_without_loads_experts_are_alike(history):
    sizes = sizes_of("8 ranks")
    placement = place_experts(history, **sizes)
    expected = place_experts(np.ones(64), **sizes)
    np.testing.assert_array_equal(placement.phy2log.ravel(), expected.phy2log)


def test_copies_stay_on_their_node_where_that_costs_nothing():
    """Equal loads are even anyway, so no copy has to leave."""
    placement = place_experts(None, n_logical=64, ep_size=16, redundants_per_rank=2, n_nodes=4)
    node = np.arange(placement.n_physical) // (placement.n_physical // 4)
    home = node[placement.log2phy[placement.phy2log, 0]]
    np.testing.assert_array_equal(home, node)


def test_a_hot_expert_leaves_its_node(rng):
    """On its own node its load would be twice the mean."""
    loads = np.ones(64)
    loads[rng.integers(64)] = 64
    placement = place_experts(loads, n_logical=64, ep_size=16, redundants_per_rank=2, n_nodes=4)
    assert imbalance(placement, np.rint(loads * 1000)[None]) <= 1.01


def test_slots_by_their_number(rng):
    history = history_for(rng, 60, 1)[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        place_experts(history, n_logical=60, ep_size=16, n_physical=64),
        place_experts(history, n_logical=60, ep_size=16, redundants_per_rank=0),
    )
