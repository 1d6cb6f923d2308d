"""Load histories, and whether a new placement is worth it: against loops and the solver."""

import concurrent.futures
import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_modes import ALL_MODES, modes

from lplb_jax import (
    LoadHistory,
    Placement,
    Refresher,
    metrics,
    moe,
    place_experts,
    refresh,
    refreshing,
    solve,
    topologies,
)

N_RANKS, N_LOGICAL, N_LAYERS, N_BATCHES = 4, 16, 3, 8
SIZES: dict[str, Any] = {"n_logical": N_LOGICAL, "ep_size": N_RANKS, "redundants_per_rank": 1}
COSTS: dict[str, Any] = {"row_s": 1e-7, "bytes_per_expert": 1e7, "link": 1e10, "steps": 1000}


def drawn(rng, n_batches=N_BATCHES):
    """Loads whose experts differ from layer to layer."""
    skew = rng.lognormal(5, 1.0, (N_LAYERS, 1, N_LOGICAL))
    return rng.poisson(skew, (N_LAYERS, n_batches, N_LOGICAL)).astype(np.int32)


def given_order(r2o=None):
    """A placement per layer that ignores loads."""
    if r2o is None:
        return place_experts(np.ones((N_LAYERS, N_LOGICAL)), **SIZES)
    one = place_experts(None, r2o, **SIZES)
    return jax.tree.map(lambda leaf: np.stack([leaf] * N_LAYERS), one)


def unbalanced(rng):
    """Loads that the given order leaves unbalanced on every layer. It may happen to suit others,
    which then gain nothing from a new one."""
    while True:
        loads = drawn(rng)
        if (refresh(loads, given_order(), **COSTS).before > 1.05).all():
            return loads


def layer(placement, i):
    return jax.tree.map(lambda leaf: leaf[i], placement)


PLACED = pytest.mark.parametrize("r2o", [None, topologies.ring(N_RANKS)], ids=["any", "ring"])


@ALL_MODES
@pytest.mark.parametrize("n_updates", [0, 3, 5, 12])
def test_a_history_keeps_the_last_batches(rng, names, n_updates):
    """In a loop, jitted with donated buffers, and in a scan: the same as a list."""
    loads = rng.integers(0, 1000, (n_updates, 2, 6)).astype(np.int32)
    expected = loads[-5:].swapaxes(0, 1)
    empty = LoadHistory.empty(n_layers=2, n_logical=6, n_batches=5)
    with modes(names):
        step = jax.jit(LoadHistory.update, donate_argnums=0)
        history = jax.tree.map(jnp.copy, empty)
        for batch in loads:
            history = step(history, batch)
        scanned, _ = jax.lax.scan(lambda h, batch: (h.update(batch), None), empty, loads)
        for kept in (history, scanned):
            assert kept.loads.dtype == kept.n_seen.dtype == jnp.int32
            np.testing.assert_array_equal(kept.batches(), expected.reshape(2, -1, 6))


def test_an_update_moves_nothing_to_the_host(rng):
    step = jax.jit(LoadHistory.update)
    history, batch = jax.device_put(
        (LoadHistory.empty(n_layers=1, n_logical=4), np.ones((1, 4), np.int32))
    )
    with jax.transfer_guard("disallow"):
        history = jax.block_until_ready(step(history, batch))
        assert history.batches().tolist() == [[[1, 1, 1, 1]]]


@PLACED
def test_loads_by_slot_and_by_expert(rng, r2o):
    loads = rng.integers(0, 1000, (N_LAYERS, N_LOGICAL)).astype(np.int32)
    placement = place_experts(rng.random((N_LAYERS, N_LOGICAL)), r2o, **SIZES)
    for quota in (metrics.even_quota(loads, placement), metrics.home_quota(loads, placement)):
        np.testing.assert_array_equal(metrics.expert_loads(quota, placement), loads)
    one = layer(placement, 0)
    split = solve(loads[0], placement=one)
    np.testing.assert_array_equal(jax.jit(metrics.expert_loads)(split.quota, one), loads[0])


@PLACED
@pytest.mark.parametrize("inference", [False, True])
def test_figures_are_those_of_the_solver(rng, r2o, inference):
    loads, placement = drawn(rng), given_order(r2o)
    result = refresh(loads, placement, inference=inference, **COSTS)
    assert result.moved.any()
    for i in range(N_LAYERS):
        old, new = layer(placement, i), layer(result.placement, i)
        largest = [
            np.mean([solve(batch, placement=each).max_load.max() for batch in loads[i, -2:]])
            for each in (old, new)
        ]
        mean = loads[i, -2:].sum() / 2 / N_RANKS
        np.testing.assert_allclose(result.before[i], largest[0] / mean, rtol=1e-6)
        np.testing.assert_allclose(result.after[i], largest[1] / mean, rtol=1e-6)
        fetched = most_fetched(old, new, inference)
        assert result.fetched[i] == fetched
        assert result.moved[i] == (old != new)
        if result.moved[i]:
            saved_s = (largest[0] - largest[1]) * 1e-7 * 1000 - fetched * 1e7 / 1e10
            np.testing.assert_allclose(result.saved_s[i], saved_s, rtol=1e-6)
            assert saved_s > 0


def most_fetched(old, new, inference):
    """Experts that are new on the rank with most of them."""

    def of_rank(placement, rank):
        per_rank = placement.n_physical // N_RANKS
        slots = range(rank * per_rank, (rank + 1) * per_rank)
        homes = set(placement.log2phy[:, 0].tolist())
        return {placement.phy2log[s] for s in slots if inference or s in homes} - {-1}

    return max(len(of_rank(new, rank) - of_rank(old, rank)) for rank in range(N_RANKS))


@PLACED
def test_weights_follow(rng, r2o):
    """The result is a placement to move experts to, of the same types."""
    placement = given_order(r2o)
    result = refresh(drawn(rng), placement, **COSTS)
    assert jax.tree.structure(result.placement) == jax.tree.structure(placement)
    for new, old in zip(*map(jax.tree.leaves, (result.placement, placement)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    of_expert = np.tile(np.arange(N_LOGICAL), (N_LAYERS, 1))
    ids = [of_home_order(layer(placement, i)) for i in range(N_LAYERS)]
    moved = moe.move_experts(jnp.array(ids), placement, result.placement)
    expected = [of_home_order(layer(result.placement, i)) for i in range(N_LAYERS)]
    np.testing.assert_array_equal(moved, expected)
    assert np.sort(expected).tolist() == of_expert.tolist()


def of_home_order(placement):
    return placement.phy2log[np.sort(placement.log2phy[:, 0])]


def test_not_worth_it(rng):
    """Too little time to use it; even experts; no batch."""
    loads, placement = unbalanced(rng), given_order()
    for history, costs, words in (
        (loads, {"steps": 1, "bytes_per_expert": 1e9, "inference": True}, "too little above"),
        (loads * 0 + 7, {}, "too little above"),
        (loads[:, :0], {}, "holds no batch"),
        (loads * 0, {}, "too little above"),
        (loads, {"most_bytes": 1.0, "inference": True}, "exceeds the limits"),
    ):
        result = refresh(history, placement, **(COSTS | costs))
        assert words in result.reason
        assert result.reason.startswith("no: ")
        assert result.placement == placement
        assert not result.moved.any()
        assert not result.fetched.any()
        np.testing.assert_array_equal(result.before, result.after)


def test_a_placement_that_gains_less_than_its_move_is_not_taken(rng):
    """If a gain is possible: a tiny cost is worth it, one just above the gain is not."""
    placement = given_order()
    while True:
        loads = drawn(rng)
        free = refresh(loads, placement, **(COSTS | {"bytes_per_expert": 1e-3}))
        gains = free.moved & (free.fetched > 0)
        if gains.any():  # Rarely not: new copies suffice in all layers.
            break
    i = int(np.argmax(gains))
    bytes_per_expert = free.saved_s[i] / free.fetched[i] * 1e10
    for factor, worth in ((0.99, True), (1.01, False)):
        costs = COSTS | {"bytes_per_expert": bytes_per_expert * factor}
        assert refresh(loads, placement, **costs).moved[i] == worth


def test_copies_are_free_in_training(rng):
    """They are fetched in every step: a new choice costs nothing, however large they are."""
    loads, placement = drawn(rng), given_order()
    result = refresh(loads, placement, **(COSTS | {"bytes_per_expert": 1e30}))
    assert not result.fetched.any()
    for i in np.flatnonzero(result.moved):
        homes = [layer(each, i).log2phy[:, 0] // 5 for each in (placement, result.placement)]
        np.testing.assert_array_equal(*homes)
        assert result.after[i] < result.before[i]


def test_limits(rng):
    """The layers that can gain most first, and no more bytes than allowed."""
    loads, placement = unbalanced(rng), given_order()
    everything = refresh(loads, placement, **COSTS)
    mean = loads[:, -2:].sum(axis=(1, 2)) / 2 / N_RANKS
    order = np.argsort(-(everything.before - 1) * mean)
    two = refresh(loads, placement, most_layers=2, **COSTS)
    assert set(np.flatnonzero(two.moved)) <= set(order[:2])
    for i in order[:2]:
        assert layer(two.placement, i) == layer(everything.placement, i)
    assert layer(two.placement, order[2]) == layer(placement, order[2])
    fetched = refresh(loads, placement, inference=True, **COSTS).fetched
    assert fetched.sum() > fetched[order[0]] > 0
    room = 1e7 * fetched[order[0]]
    first = refresh(loads, placement, inference=True, most_bytes=room, **COSTS)
    assert first.moved[order[0]]
    assert first.fetched.sum() * 1e7 <= room


def test_a_history_on_the_device_is_the_same(rng):
    loads, placement = drawn(rng), given_order()
    history = LoadHistory.empty(n_layers=N_LAYERS, n_logical=N_LOGICAL, n_batches=N_BATCHES)
    for batch in np.concatenate([loads * 3, loads], axis=1).swapaxes(0, 1):
        history = history.update(batch)
    by_ring, by_array = (
        refresh(h, p, **COSTS)
        for h, p in ((history, jax.device_put(placement)), (loads, placement))
    )
    assert by_ring.placement == by_array.placement
    assert by_ring.reason == by_array.reason


def test_a_narrow_placement(rng):
    """As `place_copies` makes them: a new one needs more columns in log2phy."""
    placement = given_order()
    narrow = dataclasses.replace(placement, log2phy=placement.log2phy[:, :, :2])
    assert (placement.log2phy[:, :, 2:] == -1).all()
    loads = drawn(rng)
    assert refresh(loads, narrow, **COSTS).placement == refresh(loads, placement, **COSTS).placement


def test_in_a_thread(rng):
    """The history can be donated right after `start`."""
    loads, placement = drawn(rng), given_order()
    expected = refresh(loads, placement, **COSTS)
    history = LoadHistory(jnp.array(loads), jnp.int32(N_BATCHES))
    refresher = Refresher(**COSTS)
    assert refresher.poll() is None
    refresher.start(history, placement)
    jax.jit(lambda h: h.update(h.loads[:, 0] * 0), donate_argnums=0)(history)
    assert refresher.poll(wait=True).placement == expected.placement
    assert refresher.poll() is None


def test_an_error_of_the_thread_reaches_the_next_call(rng):
    placement = given_order()
    wrong = drawn(rng)[:, :, :-1]
    refresher = Refresher(**COSTS)
    refresher.start(wrong, placement)
    with pytest.raises(ValueError, match=r"history: expected .*\[3, …, 16\]"):
        refresher.poll(wait=True)
    refresher.start(wrong, placement)
    concurrent.futures.wait([refresher._running])
    with pytest.raises(ValueError, match="history"):
        refresher.start(drawn(rng), placement)


def test_start_while_it_runs(rng, monkeypatch):
    """It raises at once, not when the run ends, and the result stays."""
    loads, placement = drawn(rng), given_order()
    goes_on = threading.Event()

    def held(*arguments, **options):
        assert goes_on.wait(timeout=60)
        return refresh(*arguments, **options)

    monkeypatch.setattr(refreshing, "refresh", held)
    refresher = Refresher(**COSTS)
    refresher.start(loads, placement)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="polled first"):
                refresher.start(loads * 0, placement)
    finally:
        goes_on.set()
    concurrent.futures.wait([refresher._running])
    with pytest.raises(RuntimeError, match="polled first"):
        refresher.start(loads * 0, placement)
    result = refresher.poll(wait=True)
    assert result.placement == refresh(loads, placement, **COSTS).placement
    refresher.start(loads * 0, placement)
    assert not refresher.poll(wait=True).moved.any()


def test_a_thread_takes_wide_tokens(rng):
    """More than 31 bits, as `refresh` takes them, whatever JAX does with int64."""
    wide, placement = drawn(rng).astype(np.int64) << 24, given_order()
    expected = refresh(wide, placement, **COSTS)
    refresher = Refresher(**COSTS)
    refresher.start(wide, placement)
    wide[:] = 0  # It has copied them.
    found = refresher.poll(wait=True)
    for name, value in expected._asdict().items():
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), value)


PLACEMENT = given_order()
LOADS = np.ones((N_LAYERS, 2, N_LOGICAL), np.int32)
BAD = [
    ({"steps": 0}, "steps: expected"),
    ({"row_s": 0}, "row_s: expected a finite number above 0, got 0"),
    ({"bytes_per_expert": np.nan}, "bytes_per_expert: expected"),
    ({"link": np.inf}, "link: expected"),
    ({"row_s": None}, "row_s: expected a finite number above 0, got None"),
    ({"inference": "no"}, "inference: expected a bool, got 'no'"),
    ({"most_layers": 0}, "most_layers: expected None or"),
    ({"most_layers": 1.5}, "most_layers: expected None or an integer.*got 1.5"),
    ({"most_bytes": -1}, "most_bytes: expected None or"),
    ({"most_bytes": "1 GB"}, "most_bytes: expected None or.*'1 GB'"),
    ({"history": LOADS[0]}, r"history: expected .*got \[2, 16\]"),
    ({"history": LOADS[:1]}, r"history: expected .*got \[1, 2, 16\]"),
    ({"history": LOADS * 0.5}, "history: expected whole tokens.*float64"),
    ({"history": -LOADS}, "history: expected whole tokens.*-1"),
    ({"placement": layer(PLACEMENT, 0)}, "placement: expected a layer axis"),
    ({"placement": None}, "placement: expected a lplb_jax.Placement, got NoneType"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_bad_arguments(changed, words):
    arguments = {"history": LOADS, "placement": PLACEMENT, **COSTS} | changed
    with pytest.raises((TypeError, ValueError), match=words):
        refresh(**arguments)


@pytest.mark.parametrize(
    ("changed", "words"), [bad for bad in BAD if not bad[0].keys() & {"history", "placement"}]
)
def test_bad_options_of_a_thread(changed, words):
    """As soon as they are given, not in the thread's first run."""
    with pytest.raises((TypeError, ValueError), match=words):
        Refresher(**COSTS | changed)


def test_options_of_a_thread_by_name():
    with pytest.raises(TypeError, match=r"missing.*steps"):
        Refresher(row_s=1e-7, bytes_per_expert=1e7)
    with pytest.raises(TypeError, match=r"unexpected.*most_layer"):
        Refresher(**COSTS, most_layer=1)


def test_bad_updates():
    history = LoadHistory.empty(n_layers=2, n_logical=3)
    with pytest.raises(TypeError, match="loads: expected int32, got float32"):
        history.update(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"loads: expected .*\[2, 3\], got \[3\]"):
        history.update(jnp.ones(3, jnp.int32))
    for size in ("n_layers", "n_logical", "n_batches"):
        sizes = {"n_layers": 1, "n_logical": 1, "n_batches": 1} | {size: 0}
        with pytest.raises(ValueError, match=f"{size}: expected"):
            LoadHistory.empty(**sizes)


def test_placements_of_several_nodes_stay_so(rng):
    placement = place_experts(np.ones((N_LAYERS, N_LOGICAL)), n_nodes=2, **SIZES)
    assert refresh(drawn(rng), placement, **COSTS).placement.n_nodes == 2
    assert isinstance(placement, Placement)
