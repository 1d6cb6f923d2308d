"""Weights for the slots of any placement: an exchange whose rows are experts.

Parameters are in home order (see `move_experts`): a rank holds the experts whose home it is. Each
of its slots gets the weights of the expert that the placement puts there, from whatever rank owns
it. Backwards, the gradients of all slots of an expert go to its home and are added in float32 in a
fixed order: those on the home's rank first, then by rank.

Which expert is where is data. A new placement runs the same program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._axes import varying_as
from lplb_jax.moe.copies import numbers, wider
from lplb_jax.moe.moves import home_rows, rows_per_rank
from lplb_jax.placement import Placement


class Sources(NamedTuple):
    """Where the weights of every slot are: int32 `[ep_size, slots_per_rank]` each.

    Attributes:
      owner: the rank that is home of the slot's expert; ep_size where the slot is empty.
      row: the expert's row among its owner's; any where the slot is empty.
    """

    owner: jax.Array
    row: jax.Array


def sources_of(placement: Placement) -> Sources:
    """Where the weights of a placement's slots come from."""
    n_ranks, n_local = placement.ep_size, rows_per_rank(placement)
    phy2log = jnp.asarray(placement.phy2log).reshape(n_ranks, -1)
    home = jnp.asarray(placement.log2phy)[:, 0]
    row = home_rows(home, placement.n_physical, n_ranks)[jnp.maximum(phy2log, 0)]
    return Sources(jnp.where(phy2log < 0, n_ranks, row // n_local), row % n_local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fill_slots(weights: jax.Array, sources: Sources, axis_name: Any, transport: str) -> jax.Array:
    """`[n_local, …]` in home order -> `[slots_per_rank, …]`; empty slots are 0."""
    me = lax.axis_index(axis_name)
    owner, row = (array[me] for array in sources)
    if transport == "padded":
        everyone = lax.all_gather(weights, axis_name)
        slots = everyone[jnp.minimum(owner, len(everyone) - 1), row]
        return _where(owner < len(everyone), slots)
    own = _where(owner == me, weights[row])
    # The rank that a row goes to, and the slot there, number the updates.
    sent = (sources.owner == me) & (numbers(len(sources.owner))[:, None] != me)
    slot = jnp.broadcast_to(numbers(len(owner))[None], sources.row.shape)
    received = owner[None] == numbers(len(sources.owner))[:, None]
    received &= owner[None] != me
    return _send(weights, own, sources.row, sent, slot, received, axis_name)


def _fill_forward(
    weights: jax.Array, sources: Sources, axis_name: Any, transport: str
) -> tuple[jax.Array, tuple[Sources, jax.Array]]:
    # Of the weights only their number matters.
    slots = fill_slots(weights, sources, axis_name, transport)
    return slots, (sources, jnp.zeros((len(weights), 0), jnp.int32))


def _fill_backward(
    axis_name: Any, transport: str, saved: tuple[Sources, jax.Array], ct: jax.Array
) -> tuple[jax.Array, None]:
    sources, like = saved
    me = lax.axis_index(axis_name)
    owner, row = (array[me] for array in sources)
    wide = wider(ct.dtype, jnp.float32)
    own = jnp.zeros((len(like), *ct.shape[1:]), wide)
    own = _add_rows(own, ct, jnp.where(owner == me, row, len(own)))
    send_home = _gather_home if transport == "padded" else _send_home
    return send_home(own, ct, sources, axis_name).astype(ct.dtype), None


fill_slots.defvjp(_fill_forward, _fill_backward)


def _gather_home(own: jax.Array, ct: jax.Array, sources: Sources, axis_name: Any) -> jax.Array:
    """`own` and the sums of other ranks' gradients, one rank after the other."""
    me = lax.axis_index(axis_name)
    owner, row = (array[me] for array in sources)
    n_ranks, n_local = len(sources.owner), len(own)
    elsewhere = (owner != me) & (owner < n_ranks)
    place = jnp.where(elsewhere, owner * n_local + row, n_ranks * n_local)
    sums = jnp.zeros((n_ranks * n_local, *own.shape[1:]), own.dtype)
    sums = _add_rows(sums, ct, place).reshape(n_ranks, *own.shape)
    received = lax.all_to_all(sums, axis_name, 0, 0, tiled=True)
    return lax.scan(lambda total, of_rank: (total + of_rank, None), own, received)[0]


def _send_home(own: jax.Array, ct: jax.Array, sources: Sources, axis_name: Any) -> jax.Array:
    """The same with exactly the gradients there are, in rounds: any number may go to one rank."""
    me = lax.axis_index(axis_name)
    n_ranks, n_slots = sources.owner.shape
    room = 2 * max(n_slots - len(own), 1)
    # The list of those that a rank receives, in the order of ranks and slots, and each one's place.
    rank = numbers(n_ranks)[:, None]
    remote = (sources.owner != rank) & (sources.owner < n_ranks)
    to_rank = remote.reshape(1, -1) & (sources.owner.reshape(1, -1) == rank)
    before = jnp.cumsum(to_rank, axis=1, dtype=jnp.int32) - to_rank.astype(jnp.int32)
    place = before.reshape(n_ranks, n_ranks, n_slots)  # to a rank, from a rank's slot
    to_rank = to_rank.reshape(place.shape)
    n_rounds = -(-to_rank.sum(axis=(1, 2), dtype=jnp.int32).max() // room)
    empty = varying_as(jnp.zeros((room, *ct.shape[1:]), ct.dtype), ct)
    slot = jnp.broadcast_to(numbers(n_slots)[None], (n_ranks, n_slots))

    def one_round(k: jax.Array, total: jax.Array) -> jax.Array:
        now = to_rank & (place // room == k)
        buffer = _send(ct, empty, slot, now[:, me], place[:, me] % room, now[me], axis_name)
        # Where in the buffer each sender's slot came to, turned around.
        at = jnp.where(now[me], place[me] % room, room).reshape(-1)
        rows = jnp.full(room, len(total), jnp.int32)
        rows = rows.at[at].set(sources.row.reshape(-1), mode="drop")
        return _add_rows(total, buffer, rows)

    return lax.fori_loop(0, n_rounds, one_round, varying_as(own, ct))


def _send(
    array: jax.Array,
    out: jax.Array,
    row: jax.Array,
    sent: jax.Array,
    place: jax.Array,
    received: jax.Array,
    axis_name: Any,
) -> jax.Array:
    """Rows of `array` written to rows of other ranks' `out`; every table is `[ep_size, updates]`.

    Update u to rank r is row `row[r, u]`, for place `place[r, u]` there, where `sent[r, u]`; and
    rank r sends its update u where `received[r, u]`.
    """
    # XLA moves an update by one block of threads, of which it takes some hundreds to fill a link.
    n_pieces = _divisor(array.shape[1] if array.ndim > 1 else 1, 64)
    piece = numbers(n_pieces)[None, None]

    def cut(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(rows) * n_pieces, -1, *rows.shape[2:])

    def starts(rows: jax.Array) -> jax.Array:
        return (rows[..., None] * n_pieces + piece).reshape(-1)

    def sizes(there: jax.Array) -> jax.Array:
        return jnp.repeat(there.astype(jnp.int32).reshape(-1), n_pieces)

    written = lax.ragged_all_to_all(
        cut(array), cut(out), starts(row), sizes(sent), starts(place), sizes(received),
        axis_name=axis_name,
    )  # fmt: skip
    return written.reshape(out.shape)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _add_rows(total: jax.Array, rows: jax.Array, places: jax.Array) -> jax.Array:
    """`rows` added to those of `total` at `places`, one after the other; none past its end."""

    def one(total: jax.Array, row_and_place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, place = row_and_place
        return total.at[place].add(row.astype(total.dtype), mode="drop"), None

    return lax.scan(one, varying_as(total, rows), (rows, places))[0]


def _where(there: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(there.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
