"""Tiles and base loads on an NVIDIA GPU: the CPU's bits, whatever the table and loads."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from any_cases import SIZES, Sizes
from cases import CASES, INT32_MAX, spoiled
from test_gpu_any import same_on_both, stacked, tokens
from test_tiles import native

from lplb_jax import Status, rebalance, topologies

pytestmark = pytest.mark.gpu

# Around the words of rank sets and the shapes of the solvers.
ANY = SIZES | {"32 x 10": Sizes(32, 10, 256), "144 x 3": Sizes(144, 3, 288)}
TILES = [1, 2, 7, 64, 128, 1 << 20]


def operands_of(rng, placements, n: int, tile: int):
    """Loads by source rank from less than a tile to many, and base loads, some of them invalid."""
    shape = (n, placements.ep_size, placements.n_logical)
    mean = np.log(tile * rng.choice([0.3, 1, 4, 20], (n, 1, 1)) + 1)
    loads = rng.lognormal(mean, rng.choice([0.3, 1, 2], (n, 1, 1)), shape) / placements.ep_size
    loads = np.minimum(loads, 10**6).astype(np.int32)
    base = (rng.integers(0, 5, shape[:2]) * rng.integers(0, 4, (n, 1))).astype(np.int32)
    loads[1::8], base[2::8] = spoiled(rng, loads[1::8]), spoiled(rng, base[2::8])
    loads[3], base[3] = 0, INT32_MAX // tile // 2
    return loads, base


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", [name for name in ANY if ANY[name].n_physical < 2000])
def test_any_placement(rng, name, tile):
    n = 24
    placements = stacked(rng, ANY[name], n)
    loads, base = operands_of(rng, placements, n, tile)
    r2o = np.zeros((n, placements.ep_size, 0), np.int32)

    def one(*operands):
        return jax.vmap(lambda *each: native(tile, *each))(*operands)

    split = same_on_both(one, loads, r2o, placements, base)
    clean = split.status == 0
    assert clean.sum() > n // 2
    np.testing.assert_array_equal(split.max_load[clean], split.lower_bound[clean])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CASES)
def test_along_a_topology(rng, name, tile):
    n, case = 24, CASES[name](rng)
    placements = jax.tree.map(lambda *of: np.stack(of), *[case.placement(rng) for _ in range(n)])
    loads, base = operands_of(rng, placements, n, tile)
    r2o = np.repeat(np.asarray(case.r2o)[None], n, axis=0)

    def one(*operands):
        return jax.vmap(lambda *each: native(tile, *each))(*operands)

    split = same_on_both(one, loads, r2o, placements, base)
    clean = split.status == 0
    assert clean.sum() > n // 2
    np.testing.assert_array_equal(split.max_load[clean], split.lower_bound[clean])


def test_tables_that_are_wrong(rng):
    sizes, n = SIZES["8 x 6"], 40
    placements = jax.tree.map(lambda x: spoiled(rng, x), stacked(rng, sizes, n))
    loads, base = operands_of(rng, placements, n, 8)
    r2o = np.zeros((n, sizes.ep_size, 0), np.int32)

    def one(*operands):
        return jax.vmap(lambda *each: native(8, *each))(*operands)

    split = same_on_both(one, loads, r2o, placements, base)
    assert (split.status & Status.BAD_PLACEMENT).any()


@pytest.mark.parametrize("n_tokens", [0, 700, 30_000, 300_000])
@pytest.mark.parametrize("name", ["5 x 7", "8 x 40", "33 x 3", "64 x 6", "144 x 3"])
def test_rebalance_at_once(rng, name, n_tokens):
    """In one launch and in two, for a batch with one placement and base load per instance."""
    sizes, tile = ANY[name], int(rng.choice([1, 16, 128]))
    ids, placements = tokens(rng, sizes, 3, n_tokens), stacked(rng, sizes, 3)
    base = rng.integers(0, 5, (3, sizes.ep_size)).astype(np.int32)

    def one(ids, placement, base):
        options = {"tile": tile, "base_load": base, "positions": True}
        return rebalance(ids, None, placement=placement, **options)

    assignment, split = same_on_both(jax.vmap(one), ids, placements, base)
    np.testing.assert_array_equal(split.max_load, split.lower_bound)
    np.testing.assert_array_equal(assignment.counts, split.quota)


@pytest.mark.parametrize("n_nodes", [None, 2])
def test_rebalance(rng, n_nodes):
    """Solved and assigned, with nodes along a topology, too."""
    case = CASES["cube, three combined"](rng)
    placement = case.placement(rng)
    ids = rng.integers(0, case.n_logical, (case.ep_size, 300)).astype(np.int32)
    loads = np.stack([np.bincount(row, minlength=case.n_logical) for row in ids])
    base = rng.integers(0, 3, case.ep_size).astype(np.int32)
    options = {"n_nodes": n_nodes, "positions": True, "tile": 16}

    def route(ids, loads, placement, base):
        cube = topologies.cube()
        return rebalance(ids, loads, cube, placement=placement, base_load=base, **options)

    same_on_both(route, ids, loads.astype(np.int32), placement, base)
