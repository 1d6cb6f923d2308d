"""place_experts(previous=…): few experts move, and almost no balance is lost."""

from typing import Any

import jax
import numpy as np
import pytest
from any_cases import SIZES as ANY_SIZES
from test_place_experts import SIZES, check_legal, history_for, imbalance, sizes_of

from lplb_jax import Placement, metrics, place_experts, solve, topologies

FAMILIES = {
    "equal": lambda rng, n: np.ones(n),
    "uniform": lambda rng, n: rng.random(n) + 0.1,
    "lognormal": lambda rng, n: rng.lognormal(0, 1.2, n),
    "Zipf": lambda rng, n: rng.permutation(np.arange(1, n + 1) ** -1.5),
    "one hot": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 0.2 * n, 1),
}
# n_logical, ranks, redundant slots per rank
MOST = {"8": (64, 8, 2), "64": (256, 64, 2), "no divisor": (60, 16, 1), "no copies": (256, 32, 0)}


def max_load(placement: Placement, loads: np.ndarray) -> int:
    return int(solve(loads.astype(np.int32), placement=placement).max_load.max())


def moves(old: Placement, new: Placement) -> tuple[int, int]:
    return int(metrics.experts_fetched(old, new).sum()), int(metrics.homes_moved(old, new).sum())


def check_in_old_slots(old: Placement, new: Placement):
    """Experts that stay on a rank keep their slots."""
    pairs = zip(*(one.phy2log.reshape(one.ep_size, -1) for one in (old, new)), strict=True)
    for had, has in pairs:
        for expert in np.intersect1d(had[had >= 0], has):
            assert has[list(had).index(expert)] == expert


def sizes_and_r2o(case, along) -> dict[str, Any]:
    n_logical, ep_size, redundants = MOST[case]
    sizes: dict[str, Any] = {
        "n_logical": n_logical,
        "ep_size": ep_size,
        "redundants_per_rank": redundants,
    }
    if along and (n_logical % ep_size or redundants == 0):
        pytest.skip("along a topology experts divide by ranks, and there are copies")
    fitting = [t for t in topologies.named(ep_size).values() if redundants % t.n_columns == 0]
    return sizes | ({"r2o": fitting[0]} if along else {})


@pytest.mark.parametrize("along", [False, True], ids=["any", "topology"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", MOST)
def test_small_changes_move_few(rng, case, family, along):
    """Loads that change by 5 % move at most 10 % of the experts, and cost at most 1 %.

    Along a topology more may move, since a hot expert's few neighbors have to suit it.
    """
    sizes = sizes_and_r2o(case, along)
    n_logical = sizes["n_logical"]
    loads = np.rint(1e5 * FAMILIES[family](rng, n_logical))
    previous = place_experts(loads, **sizes)
    for _ in range(2 if along else 3):
        loads = np.rint(loads * rng.uniform(0.95, 1.05, n_logical))
        kept = place_experts(loads, **sizes, previous=previous)
        assert max(moves(previous, kept)) <= (0.2 if along else 0.1) * n_logical
        assert max_load(kept, loads) <= 1.01 * max_load(place_experts(loads, **sizes), loads)
        if not along:
            check_in_old_slots(previous, kept)
        previous = kept


def test_ranks_that_are_equally_full():
    """Relieving one of two does not lower the largest load, but is a step toward it."""
    previous = Placement.from_phy2log(np.arange(64), ep_size=16)
    loads = np.full(64, 150)
    loads[:8], loads[8:16] = 200, 100  # two ranks of each
    kept = place_experts(
        loads, n_logical=64, ep_size=16, redundants_per_rank=0, previous=previous
    )  # fmt: skip
    assert max_load(kept, loads) == 600
    assert moves(previous, kept) == (8, 8)


@pytest.mark.parametrize("along", [False, True], ids=["any", "topology"])
@pytest.mark.parametrize("case", MOST)
def test_other_loads(rng, case, along):
    """Any loads are balanced as well as on a fresh placement, within 1 %."""
    sizes = sizes_and_r2o(case, along)
    family = rng.permutation(list(FAMILIES))
    before, after = (np.rint(1e5 * FAMILIES[f](rng, sizes["n_logical"])) for f in family[:2])
    previous = place_experts(before, **sizes)
    kept = place_experts(after, **sizes, previous=previous)
    assert max_load(kept, after) <= 1.01 * max_load(place_experts(after, **sizes), after)
    if not along:
        check_legal(kept, **sizes, n_nodes=1)
        check_in_old_slots(previous, kept)
    again = place_experts(after, **sizes, previous=previous)
    assert again == kept


@pytest.mark.parametrize("along", [False, True], ids=["any", "topology"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_loads_move_nothing(rng, family, along):
    sizes = sizes_and_r2o("8", along)
    loads = FAMILIES[family](rng, 64)
    previous = place_experts(loads, **sizes)
    on_device = jax.tree.map(jax.numpy.asarray, previous)
    assert place_experts(loads, **sizes, previous=previous) == previous
    assert place_experts(7 * loads, **sizes, previous=on_device) == previous


@pytest.mark.parametrize("case", SIZES)
def test_all_sizes(rng, case):
    sizes = sizes_of(case)
    histories = [history_for(rng, sizes["n_logical"], 2) for _ in range(2)]
    previous = place_experts(histories[0][None], **sizes)
    kept = place_experts(histories[1][None], **sizes, previous=previous)
    layer = jax.tree.map(lambda array: array[0], kept)
    check_legal(layer, **sizes)
    fresh = place_experts(histories[1][None], **sizes)
    fresh = jax.tree.map(lambda array: array[0], fresh)
    assert imbalance(layer, histories[1]) <= 1.01 * imbalance(fresh, histories[1])


@pytest.mark.parametrize("name", ["3 x 4", "16 x 5", "33 x 3"])
def test_any_placement_may_be_in_force(rng, name):
    """Duplicates on a rank, empty slots, homes as uneven as possible."""
    of = ANY_SIZES[name]
    sizes: dict[str, Any] = {"n_logical": of.n_logical, "ep_size": of.ep_size}
    for _ in range(4):
        table = of.phy2log(rng)
        previous = Placement.from_phy2log(table, ep_size=of.ep_size, n_logical=of.n_logical)
        loads = 1.0 + history_for(rng, of.n_logical, 1)[0]
        kept = place_experts(loads, **sizes, n_physical=of.n_physical, previous=previous)
        at_home = np.bincount(kept.log2phy[:, 0] // of.slots_per_rank)
        assert at_home.max() <= -(-of.n_logical // of.ep_size)
        fresh = place_experts(loads, **sizes, n_physical=of.n_physical)
        assert max_load(kept, loads) <= 1.01 * max_load(fresh, loads)
        assert sum(moves(previous, kept)) <= sum(moves(previous, fresh))


def test_from_a_topology_to_any_placement(rng):
    sizes = sizes_and_r2o("8", along=False)
    loads = FAMILIES["uniform"](rng, 64)
    previous = place_experts(loads, topologies.cube(), **sizes)
    kept = place_experts(loads, **sizes, previous=previous)
    assert kept.topology is None
    np.testing.assert_array_equal(kept.phy2log, previous.phy2log)
    np.testing.assert_array_equal(kept.log2phy[:, :2], previous.log2phy)


def test_eplbs_placement_in_force(rng):
    """Its even homes stay where they are."""
    sizes: dict[str, Any] = {"n_logical": 64, "ep_size": 8, "redundants_per_rank": 2}
    loads = FAMILIES["uniform"](rng, 64)
    previous = place_experts(loads, **sizes, method="eplb")
    fetched, homes = moves(previous, place_experts(loads, **sizes, previous=previous))
    assert fetched <= 6
    assert homes <= 6


@pytest.mark.parametrize("along", [False, True], ids=["any", "topology"])
def test_layers_are_kept_one_by_one(rng, along):
    sizes = sizes_and_r2o("8", along)
    histories = [history_for(rng, 64, 3) for _ in range(2)]
    previous = place_experts(histories[0], **sizes)
    kept = place_experts(histories[1], **sizes, previous=previous)
    for i, loads in enumerate(histories[1]):
        old, of_stack = (jax.tree.map(lambda array, i=i: array[i], one) for one in (previous, kept))
        assert place_experts(loads, **sizes, previous=old) == of_stack


def test_nodes_are_renumbered_as_a_whole(rng):
    """Even if everything changes, ranks stay together with their node."""
    sizes: dict[str, Any] = {"n_logical": 64, "ep_size": 16, "redundants_per_rank": 0, "n_nodes": 4}
    previous = place_experts(FAMILIES["lognormal"](rng, 64), **sizes)
    loads = FAMILIES["lognormal"](rng, 64)
    kept = place_experts(loads, **sizes, previous=previous)
    check_legal(kept, **sizes)
    fresh = place_experts(loads, **sizes)
    assert sum(moves(previous, kept)) <= sum(moves(previous, fresh))


def placed(**changes):
    sizes: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1} | changes
    return place_experts(np.ones((sizes.pop("layers"), 16)) if "layers" in sizes else None, **sizes)


WRONG = {
    "no placement": (lambda: [[0, 1]], TypeError, "lplb_jax.Placement or None, got list"),
    "experts": (lambda: placed(n_logical=12), ValueError, r"\[16, 20, 4\], got \[12, 16, 4\]"),
    "ranks": (lambda: placed(ep_size=2), ValueError, r"\[16, 20, 4\], got \[16, 18, 2\]"),
    "slots": (
        lambda: placed(redundants_per_rank=2),
        ValueError,
        r"n_physical, ep_size\] = \[16, 20, 4\], got \[16, 24, 4\]",
    ),
    "layers": (lambda: placed(layers=2), ValueError, r"\[16, 20, 4\], got \[2, 16, 20, 4\]"),
    "values": (
        lambda: jax.tree.map(lambda array: array * 0, placed()),
        ValueError,
        "a slot for each of the 16 experts, got none for expert 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradictions(name):
    make, error, words = WRONG[name]
    with pytest.raises(error, match=f"^previous: .*{words}"):
        placed(previous=make())


def test_contradictions_of_layers_and_topologies():
    with pytest.raises(ValueError, match=r"^previous: .*\[layers, n_logical.*\[3, 16.*\[2, 16"):
        placed(layers=3, previous=placed(layers=2))
    with pytest.raises(ValueError, match=r"^previous: .*\[2, 16, 20, 4\], got \[16, 20, 4\]"):
        placed(layers=2, previous=placed())
    with pytest.raises(ValueError, match=r"^previous: .* along r2o, got another arrangement"):
        placed(r2o=topologies.ring(4), previous=placed())
    with pytest.raises(ValueError, match=r"^previous: expected None with method 'eplb'"):
        placed(method="eplb", previous=placed())
    with pytest.raises(TypeError, match=r"^previous: .* known on the host"):
        jax.jit(lambda previous: placed(previous=previous))(placed())
