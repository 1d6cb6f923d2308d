"""Weights on a rank: its own experts, all its slots, or its own experts with room for copies."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax

from lplb_jax.moe.moves import rows_per_rank
from lplb_jax.moe.slots import room_for
from lplb_jax.placement import Placement


class Own(NamedTuple):
    """A rank's own experts. `moe_layer` fetches the copies, for which it copies all weights once.

    Attributes:
      experts: a pytree of arrays `[n_local, …]`, in the order of the rank's slots; without
        topology in home order, padded: see `move_experts`.
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
    experts: Any, placement: Placement, *, in_place: bool, uses_copies: bool, of_batch: bool
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
    raise ValueError(
        f"experts: expected the {' or its '.join(words for _, words in kinds.values())}, got "
        f"{n_experts}{', with in_place=True' if in_place else ''}"
    )


def unwrapped(experts: Any) -> Any:
    """The bare weights, unwrapped from one of the three types if need be."""
    return experts.experts if isinstance(experts, Own | InSlots | WithRoom) else experts
