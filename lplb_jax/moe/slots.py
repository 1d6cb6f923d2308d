"""Fetches the copies of any placement: an exchange whose rows are experts.

Parameters are in home order (see `move_experts`): a rank holds the experts whose home it is. In a
layer, a rank's weights are laid out in rows: its own experts in place, then room for the copies.
Only copies that serve tokens travel.

An expert with many copies is relayed from rank to rank and sent to each other node once: see
_relays.py. The gradients come home the same way. Where several meet, they are summed in float32 in
a fixed order and rounded once.

The placement is data: a new one runs the same program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native, _relays, reference
from lplb_jax._axes import varying_as
from lplb_jax.moe import ragged
from lplb_jax.moe.collectives import Collective
from lplb_jax.moe.copies import add_received, numbers
from lplb_jax.moe.moves import home_rows, rows_per_rank
from lplb_jax.placement import Placement


def room_for(placement: Placement) -> int:
    """The most slots that a rank can have in addition to its own experts' homes."""
    n_local, slots_per_rank = rows_per_rank(placement), placement.n_physical // placement.ep_size
    padding = placement.ep_size * n_local - placement.n_logical
    return slots_per_rank - n_local + min(padding, n_local)


def slots_by_row(placement: Placement, room: int | None = None) -> jax.Array:
    """int32 `[ep_size, n_local + room]`: local slots of each rank's homes, then of its copies.

    slots_per_rank for rows without a slot. `room`: None for `room_for`'s.
    """
    tables = map(jnp.asarray, (placement.phy2log, placement.log2phy))
    room = room_for(placement) if room is None else room
    sizes: dict[str, Any] = {"ep_size": placement.ep_size, "room": room}
    return _native.call("lplb_slots_by_row", reference.slots_by_row, *tables, **sizes)


def most_moved(placement: Placement, fan_out: int | None, *, of_used: bool) -> tuple[int, int]:
    """The most copies that travel, of an expert and of all experts of a rank.

    `of_used`: only copies with tokens. A rank with two slots of an expert uses the first, so no
    rank fetches from itself.
    """
    n_senders = placement.ep_size - of_used
    of_rank = n_senders * room_for(placement)
    of_rank = of_rank if fan_out is None else min(of_rank, fan_out)
    of_expert = max(1, min(of_rank, placement.log2phy.shape[-1] - 1))
    return min(of_expert, n_senders) if of_used else of_expert, of_rank


def inverted(slots: jax.Array, n_slots: int) -> jax.Array:
    """int32 `[ep_size, n_slots]`: each slot's row in `slots_by_row`; the number of rows if none."""
    n_ranks, n_rows = slots.shape
    rows = jnp.broadcast_to(numbers(n_rows)[None], slots.shape)
    empty = varying_as(jnp.full((n_ranks, n_slots), n_rows, jnp.int32), slots)
    return empty.at[numbers(n_ranks)[:, None], slots].set(rows, mode="drop")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["round", "peer", "row", "child", "place"],
    meta_fields=["n_local", "limits", "n_received", "axis_name", "transport"],
)
@dataclasses.dataclass(frozen=True)
class FetchAnywhere:
    """Who sends which weights to whom. Methods take one array, a rank's rows as above.

    The tables are int32 `[ep_size, room]`, for the copies of all ranks, and equal on all ranks.

    Attributes:
      round: when a copy travels; −1 if there is none, or no rank needs it.
      peer: the rank that sends it and receives its gradient.
      row: the row sent: among the peer's own experts in round 0, among its copies later.
      child: its index among the copies sent of that row in that round.
      place: the place of its gradient among all that the peer receives in that round.
      n_local: own experts of a rank (static).
      limits: the most copies of an expert that a rank sends, and the number of rounds (static).
      n_received: room for the gradients that come home (static).
      axis_name: the expert-parallel mesh axis (static).
      transport: moves the copies (static). If it is not exact, homes send all copies in one round.
    """

    round: jax.Array
    peer: jax.Array
    row: jax.Array
    child: jax.Array
    place: jax.Array
    n_local: int
    limits: _relays.Limits
    n_received: int
    axis_name: Any
    transport: Collective

    @property
    def by_engines(self) -> bool:
        """False: only the device knows the transfers."""
        return False

    def together(self, arrays: Sequence[jax.Array]) -> None:
        """None: XLA orders collectives alike on all ranks."""

    @property
    def n_copies(self) -> int:
        """Room for copies on each rank."""
        return self.round.shape[1]

    def wanted(self, weights: jax.Array) -> jax.Array:
        """What others may fetch of this rank's weights: all of them, in place."""
        return weights

    def delivered(self, wanted: jax.Array) -> jax.Array:
        """The copies that this rank receives, `[room, …]`; 0 where there is none."""
        if not self.transport.exact:
            me = lax.axis_index(self.axis_name)
            sent = (self.round == 0) & (self.peer == me)
            received = self._swap(_where(sent, wanted[jnp.where(sent, self.row, 0)]))
            return _where(self.round[me] >= 0, received[self.peer[me], numbers(self.n_copies)])
        shape = self.n_copies, *wanted.shape[1:]
        copies = varying_as(jnp.zeros(shape, wanted.dtype), wanted)
        for n in range(self.limits.rounds):
            copies = self._send_copies(copies if n else wanted, copies, n)
        return copies

    def write_into(self, weights: jax.Array, delivered: jax.Array) -> jax.Array:
        """Overwrites the weights' room with the copies."""
        return lax.dynamic_update_slice_in_dim(weights, delivered, self.n_local, axis=0)

    def sent_home(self, ct: jax.Array) -> jax.Array:
        """Sends the copies' gradients home; returns what homes receive. `ct` has all rows'."""
        of_copies = ct[self.n_local :]
        if not self.transport.exact:
            me = lax.axis_index(self.axis_name)
            home = self._travels(me, 0) & (self.peer[me][None] == numbers(len(self.peer))[:, None])
            received = self._swap(_where(home, of_copies[None]))
            return received.reshape(-1, *of_copies.shape[1:])
        for n in reversed(range(1, self.limits.rounds)):
            n_children = self.limits.relayed
            received = self._send_back(of_copies, self.n_copies * n_children, n)
            children = self._children(self.n_copies, n_children, len(received), n)
            of_copies = add_received(of_copies, received, children)
        return self._send_back(of_copies, self.n_received, 0)

    def accumulate(self, ct: jax.Array, home: jax.Array) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        children = self._children(self.n_local, self.limits.sent, len(home), 0)
        return without_room(add_received(ct, home, children), self.n_local)

    def _travels(self, rank: jax.Array, n: int) -> jax.Array:
        """bool `[1, room]`: which copies of a rank travel in round n."""
        return (self.round[rank] == n)[None]

    def _children(self, n_rows: int, most: int, n_received: int, n: int) -> jax.Array:
        """int32 `[n_rows, most]`: where the gradients of the copies of each row are received."""
        me = lax.axis_index(self.axis_name)
        mine = (self.round == n) & (self.peer == me)
        at = jnp.where(mine, self.row * most + self.child, n_rows * most)
        none = varying_as(jnp.full(n_rows * most, n_received, jnp.int32), at)
        return none.at[at].set(self.place, mode="drop").reshape(n_rows, most)

    def _swap(self, blocks: jax.Array) -> jax.Array:
        """Exchanges blocks `[room, …]`: block r of each rank goes to rank r."""
        return lax.all_to_all(blocks, self.axis_name, 0, 0, tiled=True)

    # An update is a copy of rank r, sent to or from r; r and the copy's number identify it.

    def _send_copies(self, array: jax.Array, out: jax.Array, n: int) -> jax.Array:
        me = lax.axis_index(self.axis_name)
        sent = (self.round == n) & (self.peer == me)
        received = self._travels(me, n) & (self.peer[me][None] == numbers(len(self.peer))[:, None])
        place = jnp.broadcast_to(numbers(self.n_copies)[None], self.row.shape)
        return _ragged(array, out, self.row, sent, place, received, self.axis_name)

    def _send_back(self, array: jax.Array, n_received: int, n: int) -> jax.Array:
        me = lax.axis_index(self.axis_name)
        sent = self._travels(me, n) & (self.peer[me][None] == numbers(len(self.peer))[:, None])
        received = (self.round == n) & (self.peer == me)
        row = jnp.broadcast_to(numbers(self.n_copies)[None], self.row.shape)
        place = jnp.broadcast_to(self.place[me][None], self.row.shape)
        out = varying_as(lax.empty((n_received, *array.shape[1:]), array.dtype), array)
        return _ragged(array, out, row, sent, place, received, self.axis_name)


def fetch_anywhere(
    placement: Placement,
    slots: jax.Array,
    axis_name: Any,
    transport: Collective,
    *,
    slot_loads: jax.Array | None = None,
    fan_out: int | None = None,
    n_nodes: int | None = None,
) -> FetchAnywhere:
    """Fetches the copies in `slots_by_row(placement)`; with `slot_loads`, only those with tokens.

    `fan_out` bounds how many copies of its experts a rank sends. `n_nodes`: None for the
    placement's.
    """
    n_ranks, n_local, room = placement.ep_size, rows_per_rank(placement), room_for(placement)
    slots, rank = slots[:, n_local:], numbers(n_ranks)[:, None]
    phy2log = jnp.asarray(placement.phy2log).reshape(n_ranks, -1)
    expert = phy2log.at[rank, slots].get(mode="fill", fill_value=-1)
    home = jnp.asarray(placement.log2phy)[:, 0]
    at_home = home_rows(home, placement.n_physical, n_ranks)[jnp.maximum(expert, 0)]
    owner, row = at_home // n_local, at_home % n_local
    moves, of_used = expert >= 0, slot_loads is not None
    if slot_loads is not None:
        loads = slot_loads.reshape(phy2log.shape).at[rank, slots].get(mode="fill", fill_value=0)
        moves = moves & (loads > 0) & (owner != rank)

    most, of_rank = most_moved(placement, fan_out, of_used=of_used)
    limits = _relays.direct(n_ranks, most)
    if transport.exact:
        room_of_rank = None if of_used else room
        limits = _relays.limits(n_ranks, n_nodes or placement.n_nodes, most, room_of_rank)
    rank = jnp.broadcast_to(rank, expert.shape)
    moves, at_home, owner, row, rank = (x.reshape(-1) for x in (moves, at_home, owner, row, rank))
    turn, parent, child = _relays.journeys(at_home, rank, owner, moves, limits)
    from_home, number = parent < 0, numbers(len(turn))
    peer = jnp.where(from_home, owner, parent // room)
    row = jnp.where(from_home, row, parent % room)
    if not transport.exact:
        place, n_received = number, len(number)
    else:
        n_received = min(of_rank, n_local * limits.sent)
        ahead = (turn == 0)[None] & (owner[None] == owner[:, None])
        ahead &= number[None] < number[:, None]
        place = ahead.sum(axis=1, dtype=jnp.int32)
        turn = jnp.where((turn == 0) & (place >= n_received), -1, turn)
        place = jnp.where(from_home, place, row * limits.relayed + child)
    turn, peer, row, child, place = (
        table.reshape(n_ranks, room) for table in (turn, peer, row, child, place)
    )
    return FetchAnywhere(
        turn, peer, row, child, place, n_local, limits, n_received, axis_name, transport
    )


def without_room(ct: jax.Array, n_local: int) -> jax.Array:
    """The gradients of all rows, but none of the room."""
    return lax.dynamic_update_slice_in_dim(ct, jnp.zeros_like(ct[n_local:]), n_local, axis=0)


def _ragged(
    array: jax.Array,
    out: jax.Array,
    row: jax.Array,
    sent: jax.Array,
    place: jax.Array,
    received: jax.Array,
    axis_name: Any,
) -> jax.Array:
    """Writes rows of `array` to rows of other ranks' `out`; every table is `[ep_size, updates]`.

    If `sent[r, u]`, update u to rank r is row `row[r, u]` and goes to place `place[r, u]` there. If
    `received[r, u]`, rank r sends its update u here.
    """
    # XLA moves each update with one thread block, and it takes some hundreds to saturate a link.
    length = array.shape[1] if array.ndim > 1 else 1
    n_pieces = _divisor(length, max(64, 512 // sent.size))
    piece = numbers(n_pieces)[None, None]

    def cut(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(rows) * n_pieces, -1, *rows.shape[2:])

    def starts(rows: jax.Array) -> jax.Array:
        return (rows[..., None] * n_pieces + piece).reshape(-1)

    def sizes(there: jax.Array) -> jax.Array:
        return jnp.repeat(there.astype(jnp.int32).reshape(-1), n_pieces)

    written = ragged.all_to_all(
        cut(array), cut(out), starts(row), sizes(sent), starts(place), sizes(received),
        axis_name=axis_name,
    )  # fmt: skip
    return written.reshape(out.shape)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _where(there: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(there.reshape(*there.shape, *[1] * (rows.ndim - there.ndim)), rows, 0)
