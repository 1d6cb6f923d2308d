"""Weights of replicas, fetched from the ranks that own them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplb_jax._axes import axis_names, check_axis, varying_over
from lplb_jax.moe import transports
from lplb_jax.moe.copies import Copies, check_reverse, copy
from lplb_jax.moe.moves import check_homes, rows_per_rank
from lplb_jax.moe.slots import FetchAnywhere, fetch_anywhere, inverted, slots_by_row
from lplb_jax.placement import Placement, choose_topology
from lplb_jax.topologies import Topology


def replicate_weights(
    local_weights: Any,
    r2o: Any,
    axis_name: Any,
    *,
    placement: Placement | None = None,
    redundants_per_rank: int | None = None,
    in_place: bool = False,
    transport: transports.WeightTransport = "auto",
) -> Any:
    """Fetches the weights of this rank's redundant slots from the ranks that own them.

    Along a topology it uses one `lax.ppermute` per column; for any other placement it exchanges
    experts like rows, so that a new placement needs no recompilation.

    Call it inside `jax.shard_map`, once per step and as early as possible: the transfer needs no
    tokens, so it can overlap with attention. Its derivative returns the gradients of the copies
    and adds them to the owner's.

    Args:
      local_weights: a pytree of arrays `[n_local, …]`, the rank's own experts in the order of its
        slots. With `in_place`: `[n_local + redundants_per_rank, …]`, own experts first, then room
        for the copies, which is overwritten and has no gradient. If the placement has no
        topology, in home order, padded: see `move_experts`.
      r2o: static topology `[group_size, n_columns]`, see `lplb_jax.topologies`; None for the
        placement's.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      placement: where the experts are; not needed if `r2o` is given. Without a topology it may
        have any number of copies on any ranks.
      redundants_per_rank: redundant slots of each rank, a multiple of the columns; None for the
        placement's, or without one a single slot per column.
      in_place: the arrays have room for the copies. The own weights are not copied if XLA may reuse
        their buffer: donate them to `jax.jit` and return the result of this function. Only along a
        topology.
      transport: for a placement without a topology. "ragged": only the copies that exist, by
        `lax.ragged_all_to_all`. "padded": `lax.all_to_all` with room for all copies of a rank
        between each pair of ranks. "auto" chooses as in `dispatch`.

    Returns:
      The same pytree of `[slots_per_rank, …]`: the weights of all slots. Empty ones are 0.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> spec = jax.sharding.PartitionSpec("ep")
    >>> mesh = jax.sharding.Mesh(jax.devices()[:2], "ep")
    >>> def fetch(weights):
    ...     return replicate_weights(weights, topologies.ring(2), "ep")
    >>> slots = jax.shard_map(fetch, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> slots(jnp.array([10, 11, 20, 21])).tolist()  # two experts on each rank, and one copy
    [10, 11, 20, 20, 21, 10]
    """
    if r2o is None and isinstance(placement, Placement) and placement.topology is None:
        return _anywhere(
            local_weights, placement, axis_name, redundants_per_rank, in_place, transport
        )
    r2o = choose_topology(r2o, placement)
    if placement is not None:
        if redundants_per_rank not in (None, placement.redundants_per_rank):
            raise ValueError(
                f"redundants_per_rank: expected the placement's {placement.redundants_per_rank}, "
                f"or None, got {redundants_per_rank!r}"
            )
        redundants_per_rank = placement.redundants_per_rank
    fetch = Fetch(r2o, axis_name, redundants_per_rank)

    def replicate(weights: jax.Array) -> jax.Array:
        n_local = len(weights) - (fetch.n_copies if in_place else 0)
        if fetch.n_copies > n_local:
            raise ValueError(
                f"redundants_per_rank: expected at most the experts of a rank, got "
                f"{fetch.n_copies} with local_weights of shape {list(weights.shape)}"
                f"{' in place' if in_place else ''}"
            )
        if in_place:
            check_reverse("local_weights", weights)
            return filled(fetch, weights)
        return jnp.concatenate([weights, fetch.slots(fetch.delivered(fetch.wanted(weights)))])

    return jax.tree.map(replicate, local_weights)


def _anywhere(
    local_weights: Any,
    placement: Placement,
    axis_name: Any,
    redundants_per_rank: int | None,
    in_place: bool,
    transport: str,
) -> Any:
    """`replicate_weights` for a placement without a topology."""
    n_ranks, n_local = check_axis(axis_name), rows_per_rank(placement)
    if n_ranks != placement.ep_size:
        raise ValueError(
            f"axis_name: expected an axis as large as placement.ep_size = {placement.ep_size}, got "
            f"{axis_name!r} of size {n_ranks}"
        )
    for name, value in (("redundants_per_rank", redundants_per_rank), ("in_place", in_place)):
        if value:
            raise ValueError(
                f"{name}: expected nothing with a placement that has no topology, got {value!r}: "
                f"it says what is in each slot"
            )
    check_homes("placement", placement)
    slots = slots_by_row(placement)
    fetch = fetch_anywhere(placement, slots, axis_name, transports.choose(transport, n_ranks))
    me = lax.axis_index(axis_name)
    held = jnp.asarray(placement.phy2log).reshape(n_ranks, -1)[me] >= 0
    moved = Copies(inverted(slots, len(held))[me], slots[me][:, None])

    def fill(weights: jax.Array) -> jax.Array:
        if len(weights) != n_local:
            raise ValueError(
                f"local_weights: expected arrays [n_local, …] = [{n_local}, …] with n_local = "
                f"⌈n_logical / ep_size⌉, got {list(weights.shape)}"
            )
        check_reverse("local_weights", weights)
        rows = with_room(varying_over(weights, axis_name), fetch.n_copies)
        if fetch.n_copies:
            rows = filled(fetch, rows)
        there = held.reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.where(there, copy(rows, moved), 0)

    return jax.tree.map(fill, local_weights)


def with_room(weights: jax.Array, n_copies: int) -> jax.Array:
    """Appends room for `n_copies` copies to the weights."""
    return jnp.pad(weights, [(0, n_copies), *[(0, 0)] * (weights.ndim - 1)])


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
        n_own = len(weights) - self.n_copies
        return lax.dynamic_update_slice_in_dim(weights, self.slots(delivered), n_own, axis=0)

    def sent_home(self, ct: jax.Array) -> Any:
        """Sends the copies' gradients to their owners, part by part; `ct` has all slots'."""
        of_copies = self._parts(ct[-self.n_copies :])
        (home,) = jax.linear_transpose(self.delivered, of_copies)(of_copies)
        return home

    def accumulate(self, ct: jax.Array, home: Any) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        # Autodiff would rewrite the whole array. This way XLA can update only the changed slots in
        # place, if what it reads of them is another kernel's result.
        own = lax.optimization_barrier(ct[: self.n_copies] + self.slots(home))
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
