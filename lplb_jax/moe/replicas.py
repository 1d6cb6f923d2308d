"""Weights of replicas, fetched from the ranks that own them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._axes import check_axis, varying_over
from lplb_jax._problem import check_array, check_flags
from lplb_jax.moe import transports
from lplb_jax.moe.copies import Copies, check_reverse, copy
from lplb_jax.moe.fetch import Fetch, filled
from lplb_jax.moe.moves import check_homes, lost, rows_per_rank, uneven
from lplb_jax.moe.slots import fetch_anywhere, inverted, slots_by_row
from lplb_jax.placement import Placement, choose_topology


def replicate_weights(
    local_weights: Any,
    r2o: Any = None,
    axis_name: Any = None,
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
      axis_name: the expert-parallel mesh axis (or a tuple of axes), always needed.
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
      The same pytree of `[slots_per_rank, …]`: the weights of all slots. Empty ones are 0. If a
      traced placement has a rank that is home of more than n_local experts, all are NaN, see
      `move_experts`.

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
    check_flags(in_place=in_place)
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
        check_array("local_weights", weights, "[n_local, …]")
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
    is_lost = uneven(check_homes("placement", placement), placement.n_physical, n_ranks)
    slots = slots_by_row(placement)
    fetch = fetch_anywhere(placement, slots, axis_name, transports.choose(transport, n_ranks))
    me = lax.axis_index(axis_name)
    held = jnp.asarray(placement.phy2log).reshape(n_ranks, -1)[me] >= 0
    moved = Copies(inverted(slots, len(held))[me], slots[me][:, None])

    def fill(weights: jax.Array) -> jax.Array:
        check_array("local_weights", weights, "[n_local, …]")
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
        return jnp.where(there, jnp.where(is_lost, lost(rows.dtype), copy(rows, moved)), 0)

    return jax.tree.map(fill, local_weights)


def with_room(weights: jax.Array, n_copies: int) -> jax.Array:
    """Appends room for `n_copies` copies to the weights."""
    return jnp.pad(weights, [(0, n_copies), *[(0, 0)] * (weights.ndim - 1)])
