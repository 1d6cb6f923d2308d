"""The fewest tiles and tokens of the busiest rank, as integer and linear programs over slots."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import scipy.sparse


def tiles_of(quota: np.ndarray, tile: int) -> np.ndarray:
    return -(-np.asarray(quota).astype(np.int64) // tile)


def fewest_tiles(loads: np.ndarray, phy2log: np.ndarray, base_load: np.ndarray, tile: int) -> int:
    """The fewest over all splits, by HiGHS: slot p has n_p tiles and at most tile · n_p tokens.

    phy2log `[n_ranks, slots]` and base_load `[n_ranks]` describe one group; n_p are integers.
    """
    of_expert, of_rank = _sums(loads, phy2log)
    n_slots, n_ranks = phy2log.size, len(phy2log)
    # Variables: tokens, tiles, and the largest number of tiles of a rank.
    eye = scipy.sparse.identity(n_slots)
    constraints = [
        (scipy.sparse.hstack([of_expert, 0 * of_expert, _column(len(loads), 0)]), loads, loads),
        (scipy.sparse.hstack([eye, -tile * eye, _column(n_slots, 0)]), -np.inf, 0),
        (scipy.sparse.hstack([0 * of_rank, of_rank, _column(n_ranks, -1)]), -np.inf, -base_load),
    ]
    found = scipy.optimize.milp(
        np.append(np.zeros(2 * n_slots), 1),
        constraints=[scipy.optimize.LinearConstraint(*of) for of in constraints],
        integrality=np.append(np.repeat([0, 1], n_slots), 1),
        bounds=_bounds(2 * n_slots, phy2log, 2),
    )
    assert found.success, found.message
    return round(found.fun)


def fewest_tokens(quota: np.ndarray, base_tokens: np.ndarray, phy2log: np.ndarray, tile: int):
    """The fewest over all splits with as many tiles per slot as these quotas `[n_ranks, slots]`."""
    tiles = tiles_of(quota, tile).ravel()
    n_logical = int(phy2log.max()) + 1
    loads = np.zeros(n_logical)
    np.add.at(loads, phy2log[phy2log >= 0], quota[phy2log >= 0])
    of_expert, of_rank = _sums(loads, phy2log)
    n_slots, n_ranks = phy2log.size, len(phy2log)
    found = scipy.optimize.linprog(
        np.append(np.zeros(n_slots), 1),
        A_ub=scipy.sparse.hstack([of_rank, _column(n_ranks, -1)]),
        b_ub=-base_tokens,
        A_eq=scipy.sparse.hstack([of_expert, _column(n_logical, 0)]),
        b_eq=loads,
        bounds=[
            *((max(tile * (n - 1) + 1, 0), tile * n) for n in tiles.tolist()),
            (0, None),
        ],
    )
    assert found.success, found.message
    # A flow with integer bounds: the integer optimum is the linear one, rounded up.
    return math.ceil(found.fun - 1e-6)


def _sums(loads, phy2log):
    """Matrices that sum over slots, by expert and by rank."""
    slot = np.flatnonzero(phy2log.ravel() >= 0)
    expert = phy2log.ravel()[slot]
    shape = (len(loads), phy2log.size)
    of_expert = scipy.sparse.csr_matrix((np.ones(len(slot)), (expert, slot)), shape)
    of_rank = scipy.sparse.kron(scipy.sparse.identity(len(phy2log)), np.ones((1, phy2log.shape[1])))
    return of_expert, of_rank


def _column(n: int, value: float):
    return scipy.sparse.csr_matrix(np.full((n, 1), float(value)))


def _bounds(n: int, phy2log: np.ndarray, repeats: int) -> scipy.optimize.Bounds:
    """Bounds that keep empty slots at 0."""
    most = np.tile(np.where(phy2log.ravel() >= 0, np.inf, 0), repeats)
    return scipy.optimize.Bounds(np.zeros(n + 1), np.append(most, np.inf))
