"""place_experts(method="eplb"): against DeepSeek's EPLB, and against its description."""

import pathlib

import jax
import numpy as np
import pytest

from lplb_jax import Placement, place_experts, topologies

EXAMPLES = pathlib.Path(__file__).parent / "data" / "eplb_examples.npz"


def by_rank(placement: Placement) -> np.ndarray:
    return np.asarray(placement.phy2log).reshape(placement.ep_size, -1)


def rank_loads(weight, phy2log, logcnt, n_ranks):
    """Rank loads if every copy gets an equal share."""
    return (weight / logcnt)[phy2log].reshape(n_ranks, -1).sum(axis=1)


def packed(items, n_packs):
    """(item, weight) pairs: the heaviest first, onto the lightest pack that has room."""
    per_pack = len(items) // n_packs
    if per_pack == 1:
        return [[item] for item, _ in items]
    packs = [[] for _ in range(n_packs)]
    totals = [np.float32(0)] * n_packs
    for item, weight in sorted(items, key=lambda pair: -pair[1]):
        p = min((p for p in range(n_packs) if len(packs[p]) < per_pack), key=totals.__getitem__)
        packs[p].append(item)
        totals[p] += weight
    return packs


def published(weight, n_physical, n_groups, n_nodes, n_ranks):
    """EPLB as its README describes it, item by item: the experts of every rank."""
    weight = [np.float32(w) for w in weight]
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    size = len(weight) // n_groups
    groups = [(g, np.sum(weight[g * size : (g + 1) * size])) for g in range(n_groups)]
    ranks = []
    for node in packed(groups, n_nodes):
        experts = [e for g in node for e in range(g * size, (g + 1) * size)]
        slots, count = list(experts), dict.fromkeys(experts, np.float32(1))
        while len(slots) < n_physical // n_nodes:
            slots.append(max(experts, key=lambda e: weight[e] / count[e]))
            count[slots[-1]] += 1
        ranks += packed([(e, weight[e] / count[e]) for e in slots], n_ranks // n_nodes)
    return ranks


@pytest.mark.parametrize("example", range(12))
def test_deepseeks_answers(example):
    """With tied loads, any order of equals is right: counts and rank loads decide."""
    with np.load(EXAMPLES) as file:
        n_physical, n_groups, n_nodes, n_ranks = map(int, file[f"{example}_cfg"])
        weight, phy2log, logcnt = (
            file[f"{example}_{name}"] for name in ("weight", "phy2log", "logcnt")
        )
    placement = place_experts(
        weight,
        n_logical=weight.shape[1],
        ep_size=n_ranks,
        n_physical=n_physical,
        n_groups=n_groups,
        n_nodes=n_nodes,
        method="eplb",
    )
    assert placement.phy2log.shape == phy2log.shape
    assert (placement.topology, placement.n_nodes) == (None, n_nodes)
    np.testing.assert_array_equal(placement.logcnt, logcnt)
    for layer in range(len(weight)):
        np.testing.assert_array_equal(
            rank_loads(weight[layer], placement.phy2log[layer], logcnt[layer], n_ranks),
            rank_loads(weight[layer], phy2log[layer], logcnt[layer], n_ranks),
        )


# n_logical, ranks, redundant slots per rank, groups, nodes
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 0, 1, 1),
        (8, 8, 0, 1, 1),
        (6, 3, 2, 1, 3),
        (64, 8, 2, 8, 4),
        (64, 16, 5, 4, 2),
        (48, 12, 1, 6, 3),
        (256, 64, 1, 8, 8),
        (60, 16, 2, 1, 1),
        (7, 4, 3, 7, 1),
    ],
)
@pytest.mark.parametrize("skew", [0.3, 2.5])
def test_the_published_method(rng, sizes, skew):
    n_logical, n_ranks, redundants, n_groups, n_nodes = sizes
    weight = rng.lognormal(5, skew, n_logical)
    if rng.random() < 0.5:  # with ties, and experts without load
        weight = weight.round() * (rng.random(n_logical) < 0.9)
    placement = place_experts(
        weight,
        n_logical=n_logical,
        ep_size=n_ranks,
        redundants_per_rank=redundants,
        n_groups=n_groups,
        n_nodes=n_nodes,
        method="eplb",
    )
    n_physical = n_ranks * (-(-n_logical // n_ranks) + redundants)
    expected = published(weight, n_physical, n_groups, n_nodes, n_ranks)
    np.testing.assert_array_equal(by_rank(placement), expected)


def test_homes_are_as_even_as_the_table_allows(rng):
    """With a copy of every expert on another rank, homes can be even, and they are."""
    placement = place_experts(
        np.ones(32), n_logical=32, ep_size=8, redundants_per_rank=4, method="eplb"
    )
    rank = placement.log2phy[:, 0] // (placement.n_physical // 8)
    np.testing.assert_array_equal(np.bincount(rank, minlength=8), [4] * 8)


def test_layers_and_batches(rng):
    history = rng.integers(0, 1000, (3, 5, 20))
    sizes = {"n_logical": 20, "ep_size": 4, "redundants_per_rank": 2, "method": "eplb"}
    stacked = place_experts(history, **sizes)
    by_layer = place_experts(history.sum(axis=1), **sizes)
    jax.tree.map(np.testing.assert_array_equal, stacked, by_layer)
    assert stacked.phy2log.shape == (3, 28)
    for layer in range(3):
        alone = place_experts(history[layer].sum(axis=0), **sizes)
        of_stack = jax.tree.map(lambda array, layer=layer: array[layer], stacked)
        jax.tree.map(np.testing.assert_array_equal, of_stack, alone)


def test_no_history_is_equal_loads():
    sizes = {"n_logical": 12, "ep_size": 4, "redundants_per_rank": 1, "method": "eplb"}
    jax.tree.map(
        np.testing.assert_array_equal,
        place_experts(None, **sizes),
        place_experts(np.ones(12), **sizes),
    )


GOOD = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1, "method": "eplb"}
SLOTS = {"redundants_per_rank": None}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_logical": 0}, ValueError, "n_logical: expected at least 1 expert, got 0"),
        ({"n_logical": "16"}, TypeError, "n_logical: expected an integer, got '16'"),
        ({"ep_size": 0}, ValueError, "ep_size: expected at least 1 rank, got 0"),
        ({"redundants_per_rank": -1}, ValueError, "redundants_per_rank: expected at least 0, got"),
        ({"redundants_per_rank": 1.0}, TypeError, "redundants_per_rank: expected an integer"),
        (SLOTS, ValueError, "redundants_per_rank: expected either this or n_physical, got None"),
        ({"n_physical": 20}, ValueError, "redundants_per_rank: expected either .* got 1 and 20"),
        (SLOTS | {"n_physical": 18}, ValueError, "n_physical: expected a multiple of ep_size = 4"),
        (SLOTS | {"n_physical": 12}, ValueError, "n_physical: .* n_logical = 16, got 12"),
        (SLOTS | {"n_physical": 20.0}, TypeError, "n_physical: expected an integer, got 20.0"),
        ({"n_nodes": 3}, ValueError, "n_nodes: expected a divisor of ep_size = 4, got 3"),
        ({"n_groups": 3}, ValueError, "n_groups: expected a divisor of n_logical = 16, got 3"),
        ({"n_groups": 0}, ValueError, "n_groups: expected a divisor of n_logical = 16, got 0"),
        ({"n_groups": None}, TypeError, "n_groups: expected an integer, got None"),
        ({"method": "best"}, ValueError, "method: expected .*'eplb', got 'best'"),
        ({"method": None}, ValueError, "method: expected .*'eplb', got None"),
        ({"history": np.ones((1, 1, 1, 16))}, ValueError, r"history: expected .* got \(1, 1, 1, 1"),
        ({"history": np.ones((2, 0, 16))}, ValueError, r"history: expected .* got \(2, 0, 16\)"),
        ({"history": np.ones(15)}, ValueError, r"history: expected shape .* got \(15,\)"),
        ({"history": np.full((2, 3, 16), np.nan)}, ValueError, "history: expected finite"),
        ({"history": ["hot"] * 16}, TypeError, "history: expected an array of real numbers"),
    ],
)
def test_bad_arguments(change, error, words):
    history = change.get("history", np.ones(16))
    sizes = GOOD | {name: value for name, value in change.items() if name != "history"}
    with pytest.raises(error, match=f"^{words}"):
        place_experts(history, **sizes)


@pytest.mark.parametrize("change", [{"n_groups": 2}, {"method": "best"}, {"n_physical": 20}])
def test_topologies_leave_no_choice(change):
    sizes = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1}
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name}: expected .* with r2o, got"):
        place_experts(None, topologies.ring(4), **sizes | change)
