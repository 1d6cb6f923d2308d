"""Replication topologies: which rank's experts a rank holds copies of.

A topology is a static int32 table `r2o [group_size, n_columns]` ("redundant to original"):
redundant column `d` of rank `v` copies column `d` of rank `r2o[v, d]`. Every column is a
permutation of the ranks of one group, so each rank lends and borrows one copy per column. `cube`,
`hypercube` and `torus` are the topologies of DeepSeek's LPLB.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Topology:
    """A checked `r2o` table: immutable, hashable, and an array to NumPy and `jnp.asarray`.

    Topologies with equal tables are equal, so they share compiled code. JAX treats a topology as
    static: it may be an argument of a jitted function, which is traced once per topology. Indexing,
    iteration and all other attributes and methods of an array act on the table.

    Attributes:
      r2o: read-only int32 `[group_size, n_columns]`, copied from the constructor's argument.

    Raises:
      TypeError, ValueError: see `validate`.

    >>> swap = Topology([[1], [0]])
    >>> swap == ring(2), swap == ring(3), swap[0, 0].item(), np.asarray(swap).shape
    (True, False, 1, (2, 1))
    """

    r2o: np.ndarray
    _key: tuple[tuple[int, ...], bytes] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        table = _checked(self.r2o)
        object.__setattr__(self, "r2o", table)
        # Bytes cache their hash, which JAX needs at each call of a jitted function.
        object.__setattr__(self, "_key", (table.shape, table.tobytes()))

    @property
    def group_size(self) -> int:
        """Ranks in a group."""
        return self.r2o.shape[0]

    @property
    def n_columns(self) -> int:
        """Ranks that each rank copies from."""
        return self.r2o.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(group_size, n_columns)`."""
        return self.r2o.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.r2o, dtype=dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        # Other attributes of an array: dtype, T, tolist, … Protocols must be defined above.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.r2o, name)

    def __getitem__(self, item: Any) -> Any:
        return self.r2o[item]

    def __len__(self) -> int:
        return len(self.r2o)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.r2o)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return self is other or self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled arrays come back writable.
        return Topology, (self.r2o,)

    def __repr__(self) -> str:
        table = np.array2string(self.r2o, separator=", ", threshold=32, edgeitems=2)
        return f"Topology({' '.join(table.split())})"


def ring(n: int) -> Topology:
    """Every rank copies from the next one: `r2o[v] = [(v + 1) mod n]`.

    Args:
      n: ranks in the group, at least 2.

    Returns:
      int32 `[n, 1]`.

    >>> ring(4).tolist()
    [[1], [2], [3], [0]]
    """
    _at_least(2, n=n)
    return Topology(np.roll(np.arange(n), -1)[:, None])


def cube() -> Topology:
    """Eight ranks with two columns each, along the edges and diagonals of a cube (LPLB).

    Returns:
      int32 `[8, 2]`.

    >>> cube()[0].tolist()
    [3, 6]
    """
    return Topology(np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T)


def hypercube() -> Topology:
    """Sixteen ranks with two columns each, along a four-dimensional hypercube (LPLB).

    Returns:
      int32 `[16, 2]`.

    >>> hypercube()[0].tolist()
    [3, 12]
    """
    within_face = [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14]
    across_faces = np.roll(np.arange(16), 4)
    return Topology(np.stack([within_face, across_faces], axis=1))


def torus(m: int, n: int) -> Topology:
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
    return Topology(np.stack([np.roll(grid, -1, 0).ravel(), np.roll(grid, -1, 1).ravel()], axis=1))


def complete(n: int) -> Topology:
    """Every rank copies from every other: column d of rank v is rank (v + d + 1) mod n.

    Args:
      n: ranks in the group, at least 2.

    Returns:
      int32 `[n, n - 1]`.

    >>> complete(3).tolist()
    [[1, 2], [2, 0], [0, 1]]
    """
    _at_least(2, n=n)
    return Topology((np.arange(n)[:, None] + np.arange(1, n)) % n)


class Named(NamedTuple):
    """A topology by its name.

    Attributes:
      make: builds the topology for a given number of ranks.
      fits: whether it exists for that number of ranks.
    """

    make: Callable[[int], Topology]
    fits: Callable[[int], bool]


def named(n_ranks: int) -> dict[str, Topology]:
    """The topologies in `NAMED` that fit a group of `n_ranks`.

    Args:
      n_ranks: ranks in the group, at least 1.

    Returns:
      name → `Topology`, in the order of `NAMED`.

    Raises:
      ValueError: `n_ranks` is not a positive integer.

    >>> list(named(8)), list(named(3))
    (['cube', 'ring', 'torus', 'complete'], ['ring', 'complete'])
    """
    _at_least(1, n_ranks=n_ranks)
    return {name: entry.make(n_ranks) for name, entry in NAMED.items() if entry.fits(n_ranks)}


def validate(r2o: Any) -> Topology:
    """Returns `r2o` as a `Topology`; raises if it is not one.

    Args:
      r2o: a `Topology`, which is returned as it is, or integers `[group_size, n_columns]`, known at
        trace time; every column a permutation of 0 … group_size − 1. A rank may copy from itself:
        that slot then stays unused.

    Returns:
      `Topology`, an int32 array `[group_size, n_columns]` to NumPy.

    Raises:
      TypeError: `r2o` is traced, or not of integers.
      ValueError: it is not two-dimensional, is empty, or a column is not a permutation.

    >>> validate([[1], [0]]).shape
    (2, 1)
    """
    return r2o if isinstance(r2o, Topology) else Topology(r2o)


def _checked(r2o: Any) -> np.ndarray:
    """A read-only copy of `r2o`; raises if it is not a topology."""
    if isinstance(r2o, jax.core.Tracer):
        raise TypeError(
            "r2o: expected a static array (NumPy, or lplb_jax.topologies), got a traced value; "
            "close over r2o, or pass it to the jitted function as a lplb_jax.topologies.Topology"
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
    array = np.array(array, dtype=np.int32)
    array.setflags(write=False)
    return array


def _squarest_torus(n_ranks: int) -> Topology:
    return torus(n_ranks // _columns(n_ranks), _columns(n_ranks))


def _columns(n_ranks: int) -> int:
    """The shorter side of the most nearly square grid of `n_ranks`."""
    return max(n for n in range(1, math.isqrt(n_ranks) + 1) if n_ranks % n == 0)


def _at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {size!r}")


NAMED: Mapping[str, Named] = types.MappingProxyType(
    {
        "cube": Named(lambda n_ranks: cube(), lambda n_ranks: n_ranks == 8),
        "hypercube": Named(lambda n_ranks: hypercube(), lambda n_ranks: n_ranks == 16),
        "ring": Named(ring, lambda n_ranks: n_ranks >= 2),
        "torus": Named(_squarest_torus, lambda n_ranks: _columns(n_ranks) >= 2),
        "complete": Named(complete, lambda n_ranks: n_ranks >= 2),
    }
)
"""Every topology by name, with the group sizes it fits. `named(n_ranks)` builds those that fit."""
