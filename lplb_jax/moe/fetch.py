"""Fetches the copies along a topology: one `lax.ppermute` per column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplb_jax._axes import axis_names, check_axis
from lplb_jax.moe.slots import FetchAnywhere
from lplb_jax.topologies import Topology


@jax.tree_util.register_static
class Fetch:
    """Who sends which weights to whom. Methods take one array, a rank's own experts first.

    Attributes:
      n_copies: redundant slots of each rank.
      by_engines: whether copy engines, not kernels, move them under `COMPILER_OPTIONS`.
    """

    def __init__(
        self,
        r2o: Topology | np.ndarray,
        axis_name: Any,
        redundants_per_rank: int | None,
        *,
        by_engines: bool = False,
    ) -> None:
        self.by_engines = by_engines
        group_size, n_columns = r2o.shape
        axis_size = check_axis(axis_name)
        if axis_size % group_size:
            raise ValueError(
                f"axis_name: expected an axis whose size is a multiple of the group size "
                f"{group_size} of r2o, got {axis_name!r} of size {axis_size}"
            )
        n_copies = n_columns if redundants_per_rank is None else redundants_per_rank
        if not isinstance(n_copies, int | np.integer) or n_copies < 1 or n_copies % n_columns:
            raise ValueError(
                f"redundants_per_rank: expected a multiple of the {n_columns} columns of r2o, got "
                f"{redundants_per_rank!r}"
            )
        self.n_copies = int(n_copies)
        self._axes, number = _as_ppermute_counts(axis_name)
        # (from, to) for each column.
        self._pairs = [
            [
                (number[first + int(r2o[v, d])], number[first + v])
                for first in range(0, axis_size, group_size)
                for v in range(group_size)
            ]
            for d in range(n_columns)
        ]

    # Redundant slot j·D + d is a copy of local expert j·D + d, of column d. Data in flight stays in
    # parts, one per column, since concatenating early would wait for all of them.

    def together(self, arrays: Sequence[jax.Array]) -> None:
        """None: XLA orders collectives alike on all ranks."""

    def delivered(self, wanted: Any) -> Any:
        """Sends what is `wanted` of every rank; returns what this rank receives, part by part."""
        return [
            lax.ppermute(part, self._axes, pairs)
            for part, pairs in zip(wanted, self._pairs, strict=True)
        ]

    def wanted(self, weights: jax.Array) -> Any:
        """The parts of this rank's weights that others fetch."""
        return self._parts(weights[: self.n_copies])

    def slots(self, delivered: Any) -> jax.Array:
        """Joins the parts slot by slot: `[n_copies, …]`."""
        return jnp.stack(delivered, axis=1).reshape(self.n_copies, *delivered[0].shape[1:])

    def write_into(self, weights: jax.Array, delivered: Any) -> jax.Array:
        """Overwrites the last n_copies of the weights with the copies."""
        return self.fill(weights, self.slots(delivered))

    def fill(self, weights: jax.Array, copies: jax.Array) -> jax.Array:
        """Overwrites the last n_copies of the weights with `[n_copies, …]`."""
        n_own = len(weights) - self.n_copies
        return lax.dynamic_update_slice_in_dim(weights, copies, n_own, axis=0)

    def sent_home(self, ct: jax.Array) -> Any:
        """Sends the copies' gradients to their owners, part by part; `ct` has all slots'."""
        of_copies = self._parts(ct[-self.n_copies :])
        (home,) = jax.linear_transpose(self.delivered, of_copies)(of_copies)
        return home

    def accumulate(self, ct: jax.Array, home: Any) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        return self.add_home(ct, self.slots(home))

    def add_home(self, ct: jax.Array, home: jax.Array) -> jax.Array:
        """`accumulate` of `[n_copies, …]`."""
        # Autodiff would rewrite the whole array. This way XLA can update only the changed slots in
        # place, if what it reads of them is another kernel's result.
        own = lax.optimization_barrier(ct[: self.n_copies] + home)
        ct = lax.dynamic_update_slice_in_dim(ct, own, 0, axis=0)
        none, n_own = jnp.zeros_like(own), len(ct) - self.n_copies
        return lax.dynamic_update_slice_in_dim(ct, none, n_own, axis=0)

    def _parts(self, slots: jax.Array) -> list[jax.Array]:
        return [slots[d :: len(self._pairs)] for d in range(len(self._pairs))]


def _as_ppermute_counts(axis_name: Any) -> tuple[tuple[Any, ...], list[int]]:
    """The axes in the mesh's order, and the number of every rank of `axis_name` in that order.

    `lax.ppermute` numbers ranks in the mesh's order of axes whatever order it is given (newer
    versions refuse any other order); all other collectives use the order given.
    """
    axes, mesh_axes = axis_names(axis_name), jax.sharding.get_abstract_mesh().axis_names
    order = sorted(range(len(axes)), key=lambda i: mesh_axes.index(axes[i]))
    sizes = [lax.axis_size(axis) for axis in axes]
    # Ranks as the other collectives number them, laid out in the mesh's order, then inverted.
    ranks = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).ravel()
    return tuple(axes[i] for i in order), np.argsort(ranks).tolist()


@jax.custom_vjp
def filled(fetch: Fetch | FetchAnywhere, weights: jax.Array) -> jax.Array:
    """Overwrites the weights' room with the copies."""
    return fetch.write_into(weights, fetch.delivered(fetch.wanted(weights)))


filled.defvjp(
    lambda fetch, weights: (filled(fetch, weights), fetch),
    lambda fetch, ct: (None, _accumulated(fetch, ct)),
)


def _accumulated(fetch: Fetch | FetchAnywhere, ct: Any) -> Any:
    """Returns gradients to their owners; float0, of integers such as quantized weights, pass."""
    if ct.dtype == jax.dtypes.float0:
        return ct
    return fetch.accumulate(ct, fetch.sent_home(ct))
