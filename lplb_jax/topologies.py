"""Replication topologies: which rank's experts a rank holds copies of.

A topology is a static int32 array `r2o [group_size, n_columns]` ("redundant to original"):
redundant column `d` of rank `v` copies column `d` of rank `r2o[v, d]`. Every column is a
permutation of the ranks of one group, so each rank lends and borrows one copy per column. `cube`,
`hypercube` and `torus` are the topologies of DeepSeek's LPLB.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def ring(n: int) -> np.ndarray:
    """Every rank copies from the next one: `r2o[v] = [(v + 1) mod n]`.

    Args:
      n: ranks in the group, at least 2.

    Returns:
      int32 `[n, 1]`.

    >>> ring(4).tolist()
    [[1], [2], [3], [0]]
    """
    _at_least(2, n=n)
    return _frozen(np.roll(np.arange(n), -1)[:, None])


def cube() -> np.ndarray:
    """Eight ranks with two columns each, along the edges and diagonals of a cube (LPLB).

    Returns:
      int32 `[8, 2]`.

    >>> cube()[0].tolist()
    [3, 6]
    """
    return _frozen(np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T)


def hypercube() -> np.ndarray:
    """Sixteen ranks with two columns each, along a four-dimensional hypercube (LPLB).

    Returns:
      int32 `[16, 2]`.

    >>> hypercube()[0].tolist()
    [3, 12]
    """
    within_face = [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14]
    across_faces = np.roll(np.arange(16), 4)
    return _frozen(np.stack([within_face, across_faces], axis=1))


def torus(m: int, n: int) -> np.ndarray:
    """An m × n grid that wraps around; rank i·n + j copies from the next row and the next column.

    Args:
      m: rows, at least 2.
      n: columns, at least 2.

    Returns:
      int32 `[m·n, 2]`.

    >>> torus(2, 3)[0].tolist()
    [3, 1]
    """
    _at_least(2, m=m, n=n)
    grid = np.arange(m * n).reshape(m, n)
    return _frozen(np.stack([np.roll(grid, -1, 0).ravel(), np.roll(grid, -1, 1).ravel()], axis=1))


def complete(n: int) -> np.ndarray:
    """Every rank copies from every other: column d of rank v is rank (v + d + 1) mod n.

    Args:
      n: ranks in the group, at least 2.

    Returns:
      int32 `[n, n - 1]`.

    >>> complete(3).tolist()
    [[1, 2], [2, 0], [0, 1]]
    """
    _at_least(2, n=n)
    return _frozen((np.arange(n)[:, None] + np.arange(1, n)) % n)


def validate(r2o: Any) -> np.ndarray:
    """Returns `r2o` as a read-only int32 array, or says what is wrong with it.

    Args:
      r2o: integers `[group_size, n_columns]`, known at trace time; every column a permutation of
        0 … group_size − 1. A rank may copy from itself: that slot then stays unused.

    Returns:
      int32 `[group_size, n_columns]`.

    Raises:
      TypeError: `r2o` is traced, or not of integers.
      ValueError: it is not two-dimensional, is empty, or a column is no permutation.

    >>> validate([[1], [0]]).shape
    (2, 1)
    """
    if isinstance(r2o, jax.core.Tracer):
        raise TypeError(
            "r2o: expected a static array (NumPy, or lplb_jax.topologies), got a traced value; "
            "close over r2o instead of passing it as an argument of the jitted function"
        )
    array = np.asarray(r2o)
    if array.dtype.kind not in "iu":
        raise TypeError(f"r2o: expected integers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 1:
        raise ValueError(
            f"r2o: expected shape [group_size, n_columns], both at least 1, got {array.shape}"
        )
    ranks = np.arange(array.shape[0])
    for d, column in enumerate(array.T):
        if not np.array_equal(np.sort(column), ranks):
            raise ValueError(
                f"r2o: expected every column to be a permutation of 0 … {len(ranks) - 1}, "
                f"got column {d} = {column.tolist()}"
            )
    return _frozen(array)


def _at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {size!r}")


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.array(array, dtype=np.int32)
    array.setflags(write=False)
    return array
