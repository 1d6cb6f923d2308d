"""Weights on a rank: its own experts, all its slots, or its own experts with room for copies.

And how the layer fetches the copies, if it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from lplb_jax._problem import Problem, check_unsharded
from lplb_jax.moe import transports
from lplb_jax.moe.fetch import Fetch, filled
from lplb_jax.moe.flight import Flight
from lplb_jax.moe.moves import rows_per_rank
from lplb_jax.moe.plan import Counted, Transport
from lplb_jax.moe.replicas import with_room
from lplb_jax.moe.slots import fetch_anywhere, room_for, slots_by_row
from lplb_jax.moe.transfers import AnyFetch, Beside
from lplb_jax.moe.window_fetch import window_fetch
from lplb_jax.placement import Placement


class Own(NamedTuple):
    """A rank's own experts. `moe_layer` fetches the copies, for which it copies all weights once.

    The type makes sure that a rank has n_local experts: bare weights of slots_per_rank experts are
    taken as `InSlots`, also if they belong to another placement.

    Attributes:
      experts: a pytree of arrays `[n_local, …]`, in the order of the rank's slots; without
        topology in home order, padded: see `move_experts`. No rank may then be home of more than
        n_local = ⌈n_logical / ep_size⌉ experts.
    """

    experts: Any


class InSlots(NamedTuple):
    """The weights of all slots of a rank, with copies already fetched by `replicate_weights`.

    Attributes:
      experts: a pytree of arrays `[slots_per_rank, …]`.
    """

    experts: Any


class WithRoom(NamedTuple):
    """A rank's own experts, followed by room that `moe_layer` overwrites with copies.

    The own weights are not copied if XLA may reuse their buffer: donate them to `jax.jit` and
    return the `LayerResult`'s before other results. The room has no gradient.

    Attributes:
      experts: a pytree of arrays `[n_local + room, …]`, own experts as in `Own`. The room is for
        the redundant slots, so that n_local + room is slots_per_rank. Without a topology, if
        n_logical is not a multiple of ep_size, there is more: room for the most copies that a rank
        can have. With balance="none" there is no room.
    """

    experts: Any


Weights: TypeAlias = Own | InSlots | WithRoom


def as_weights(
    experts: Any,
    placement: Placement,
    axis_name: Any,
    *,
    in_place: bool,
    uses_copies: bool,
    of_batch: bool,
) -> Weights:
    """`experts` as one of the three types; raises if the leading size does not match.

    Without a type, `in_place` means `WithRoom`; otherwise the leading size decides.
    """
    typed = isinstance(experts, Own | InSlots | WithRoom)
    if in_place and typed and not isinstance(experts, WithRoom):
        raise ValueError(
            f"in_place: expected it with experts of type WithRoom, got {type(experts).__name__}"
        )
    n_local, n_slots = rows_per_rank(placement), placement.n_physical // placement.ep_size
    room = room_for(placement) if uses_copies else 0
    own = f"{n_local} own experts of a rank"
    kinds: dict[type[Weights], tuple[int, str]] = {Own: (n_local, own)}
    if uses_copies and not of_batch:
        kinds[InSlots] = n_slots, f"{n_slots} slots"
    if in_place or isinstance(experts, WithRoom):
        kinds = {WithRoom: (n_local + room, f"{own} and room for {room} copies" if room else own)}
    elif typed:
        kinds = {kind: expected for kind, expected in kinds.items() if kind is type(experts)}
    if not kinds:
        raise ValueError(
            "experts: expected Own or WithRoom if copies are chosen for the batch or not used, "
            "got InSlots"
        )
    n_experts = len(jax.tree.leaves(experts)[0])
    for kind, (number, _) in kinds.items():
        if n_experts == number:
            return experts if typed else kind(experts)
    words = (
        f"experts: expected the {' or its '.join(words for _, words in kinds.values())}, got "
        f"{n_experts}{', with in_place=True' if in_place else ''}"
    )
    check_unsharded(placement, axis_name, words)
    if n_experts == placement.n_logical:
        words += (
            f", as many as placement has on all ranks; shard them with in_specs P({axis_name!r}), "
            f"or if placement was sharded, pass that with P()"
        )
    raise ValueError(words)


def unwrapped(experts: Any) -> Any:
    """The bare weights, unwrapped from one of the three types if need be."""
    return experts.experts if isinstance(experts, Own | InSlots | WithRoom) else experts


def check_keeping(keep_copies: bool, weights: Weights, problem: Problem, *, fetches: bool) -> None:
    """Raises if copies are to be fetched again in a layer that cannot do it."""
    again = fetches and isinstance(weights, Own) and not problem.along_topology
    if not (keep_copies or again):
        raise ValueError(
            "keep_copies: expected True if no copies are fetched here, or they are fetched in "
            "place or along a topology, got False; wrap the layer in jax.checkpoint"
        )


def slot_order(problem: Problem, *, uses_copies: bool, fetches: bool) -> jax.Array | None:
    """int32 `[ep_size, n]`: the slots of each rank in the order of its weights; None if equal."""
    if not uses_copies:
        return slots_by_row(problem.placement, room=0)
    if fetches and not problem.along_topology:
        return slots_by_row(problem.placement)
    return None


def fetch_for(
    held: Any,
    problem: Problem,
    order: jax.Array | None,
    counted: Counted,
    carrier: Transport,
    fan_out: int | None,
    *,
    again: bool,
) -> AnyFetch | None:
    """Who sends which copies of `held` to whom; None if there is no room for any.

    `order` is `slot_order`'s result. `again`: they are fetched again in the backward pass.
    """
    placement, axis_name = problem.placement, counted.axis_name
    if problem.along_topology:
        n_copies, by_engines = placement.redundants_per_rank, carrier.beside_engines
        if carrier.comm_for_copies is not None:
            flight = Flight(problem.r2o, axis_name, n_copies, carrier.comm_for_copies)
            flight.check(held)
            return flight
        return Fetch(problem.r2o, axis_name, n_copies, by_engines=by_engines)
    if order is None or not room_for(placement):
        return None
    by = transports.for_weights(carrier, problem.ep_size)
    limits = {"slot_loads": counted.slot_loads, "fan_out": fan_out, "n_nodes": problem.n_nodes}
    # Nothing would order what is fetched again among the exchanges of the backward pass.
    if carrier.windows is not None and not again:
        relayed = {"relays": by.exact, **limits}
        fetch = window_fetch(placement, order, axis_name, held, carrier.windows, **relayed)
        if fetch is not None:
            return fetch
    return fetch_anywhere(placement, order, axis_name, by, **limits)


def with_room_for(
    fetch: AnyFetch, own: Any, keep_copies: bool
) -> tuple[Beside, Callable[[Any], Any] | None]:
    """What travels beside the tokens, and how to fetch it again.

    If copies are kept: own experts with room for them, and None. Otherwise own experts alone, and a
    function that makes all slots' weights of them.
    """

    def roomy(weights: jax.Array) -> jax.Array:
        return with_room(weights, fetch.n_copies)

    if keep_copies:
        return Beside(jax.tree.map(roomy, own), fetch, waits=True), None

    def refetch(own: Any) -> Any:
        return jax.tree.map(lambda weights: filled(fetch, roomy(weights)), own)

    return Beside(own, follows=True), refetch
