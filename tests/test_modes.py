"""JAX's stricter modes: every public function gives the same results as without them."""

import contextlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, counts_of, tokens
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import assert_same

import lplb_jax
from lplb_jax import (
    Placement,
    _native,
    assign,
    count_loads,
    metrics,
    place_copies,
    place_experts,
    rebalance,
    solve,
    sync_loads,
    topologies,
)

CASE = Case(topologies.ring(4), 4, combined=2)
# Without a topology: experts with two and three slots, one slot empty.
ANYWHERE = Placement.from_phy2log(
    [[0, 1, 2, 3, 8], [4, 5, 6, 7, 8], [8, 9, 10, 11, 0], [12, 13, 14, 15, -1]], ep_size=4
)

MODES = {
    "strict types": lambda: jax.numpy_dtype_promotion("strict"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
    "64 bits": lambda: jax.enable_x64(True),
}


@contextlib.contextmanager
def modes(names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(MODES[name]())
        yield


ALL_MODES = pytest.mark.parametrize("names", [*([name] for name in MODES), list(MODES)], ids=str)


def over_ranks(function):
    """`function` inside shard_map over four virtual devices, with the tokens by rank."""

    def run(ids, loads, placement):
        mesh = Mesh(np.array(jax.devices("cpu")[:4]), "ep")
        specs: dict[str, Any] = {"in_specs": (P("ep"), P()), "out_specs": (P("ep"), P())}
        return jax.shard_map(function, mesh=mesh, **specs)(ids, placement)

    return run


@over_ranks
def gathered(ids, placement):
    return rebalance(ids, None, CASE.r2o, placement=placement, axis_name="ep")


@over_ranks
def synced(ids, placement):
    return ids, sync_loads(count_loads(ids, CASE.n_logical), "ep")


def assigned(ids, loads, placement):
    split = solve(loads, CASE.r2o, placement=placement)
    return assign(ids, loads, split, CASE.r2o, placement=placement, positions=True)


def measured(ids, loads, placement):
    counts = count_loads(ids, CASE.n_logical)
    split = solve(counts, CASE.r2o, placement=placement)
    ranks = metrics.rank_loads(split.quota, CASE.ep_size)
    quotas = metrics.home_quota(counts, placement), metrics.even_quota(counts, placement)
    moved = metrics.tokens_moved(split.quota, placement)
    weights = [of(ANYWHERE, placement) for of in (metrics.experts_fetched, metrics.homes_moved)]
    return quotas, ranks, moved, weights, metrics.imbalance(ranks), metrics.gain(ranks, ranks)


def with_copies_anywhere(ids, loads, placement):
    split = solve(loads, placement=ANYWHERE)
    return split, rebalance(ids, None, placement=ANYWHERE, positions=True)


# Functions of ids `[ep_size, tokens]`, loads by source, and a placement.
CALLS = {
    "count_loads": lambda ids, loads, p: count_loads(ids, CASE.n_logical),
    "sync_loads": synced,
    "solve": lambda ids, loads, p: solve(loads, CASE.r2o, placement=p),
    "place_copies": lambda ids, loads, p: place_copies(loads, p),
    "assign": assigned,
    "rebalance": lambda ids, loads, p: rebalance(ids, None, CASE.r2o, placement=p, positions=True),
    "rebalance by source": lambda ids, loads, p: rebalance(ids, loads, CASE.r2o, placement=p),
    "rebalance by statistics": lambda ids, loads, p: rebalance(
        ids, loads.sum(0, jnp.int32), CASE.r2o, placement=p
    ),
    "rebalance over ranks": gathered,
    "any placement": with_copies_anywhere,
    "copies of the batch": lambda ids, loads, p: rebalance(ids, None, placement=p, copies="batch"),
    "metrics": measured,
}
INTERIOR = {
    "solve for floats": lambda ids, loads, p: solve(
        loads.astype(jnp.float32), CASE.r2o, placement=p, rank_weights=[1, 2, 1, 3]
    ),
    "solve by interior point": lambda ids, loads, p: solve(
        loads, CASE.r2o, placement=p, solver="ipm"
    ),
    "solve without repair": lambda ids, loads, p: solve(
        loads, CASE.r2o, placement=p, solver="ipm", repair=False
    ),
    "any placement by interior point": lambda ids, loads, p: (
        solve(loads.astype(jnp.float32), placement=ANYWHERE, rank_weights=[1, 2, 1, 3]),
        rebalance(ids, None, placement=ANYWHERE, solver="ipm"),
    ),
    "rebalance by interior point": lambda ids, loads, p: rebalance(
        ids, None, CASE.r2o, placement=p, rank_weights=np.ones(4)
    ),
}


@pytest.fixture
def operands(rng):
    ids = tokens(rng, CASE, 50)
    return ids, counts_of(ids, CASE.n_logical), CASE.placement(rng)


@ALL_MODES
@pytest.mark.parametrize("name", CALLS | INTERIOR)
def test_native_code(operands, names, name):
    """Traced anew, and without jit."""
    function = (CALLS | INTERIOR)[name]
    expected = jax.jit(function)(*operands)
    with modes(names):
        assert_same(jax.jit(function)(*operands), expected)
        assert_same(function(*operands), expected)


@pytest.mark.parametrize("name", CALLS | INTERIOR)
def test_a_transfer_guard(operands, name):
    """Without jit: arrays are on the mesh, and only the library's own tables move there."""
    function = (CALLS | INTERIOR)[name]
    expected = jax.jit(function)(*operands)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), "ep")
    placed = jax.device_put(operands, NamedSharding(mesh, P()))
    with jax.transfer_guard("disallow"):
        got = jax.block_until_ready(function(*placed))
    assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:lplb_jax was installed without")
def test_the_reference(operands, monkeypatch, name):
    """Without native code, under all modes at once."""
    expected = jax.jit(CALLS[name])(*operands)
    monkeypatch.setattr(_native, "AVAILABLE", {})
    with modes(MODES):
        assert_same(jax.jit(lambda *operands: CALLS[name](*operands))(*operands), expected)


@ALL_MODES
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_types_of_indices(operands, names, dtype):
    """Ids without an expert stay so in every dtype."""
    ids, _, placement = operands
    expected = rebalance(ids, None, CASE.r2o, placement=placement)
    with modes(names):
        assert_same(rebalance(ids.astype(dtype), None, CASE.r2o, placement=placement), expected)


@ALL_MODES
def test_placing_experts(rng, names):
    history = rng.random((2, CASE.n_logical))
    sizes: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1}
    expected = place_experts(history, CASE.r2o, **sizes)
    with modes(names):
        assert_same(place_experts(history, CASE.r2o, **sizes), expected)


def test_no_function_is_left_out():
    """A new public function must get a line above."""
    public = {name for name in lplb_jax.__all__ if inspect.isfunction(getattr(lplb_jax, name))}
    on_the_host = {"advise", "export_checks", "init_comm", "place_experts", "refresh", "verify"}
    assert public - on_the_host <= set(CALLS)
