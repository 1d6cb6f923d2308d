"""Rows of experts on every rank, and the copies that ranks send one another directly.

A rank's rows are its own experts, whose home it is, in the order of their slots, then its copies,
likewise. A copy travels from its expert's home if it has tokens. Copies are numbered rank by rank;
beyond `most` of an expert or `n_received` of a home's, the last ones do not travel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from lplb_jax._axes import varying_as
from lplb_jax.reference.plan import starts

Rows = Int32[Array, "ep_size n_rows"]


class Journeys(NamedTuple):
    """Of one rank, in experts; −1 for none.

    Attributes:
      rank, copy, order: where each row is sent, as which of the copies there, and its place among
        those sent there, in the order of the rows.
      sent: the rows that are sent anywhere; n_rows past the last.
      nth: the inverse; n_sent for rows that are not sent.
      received: the copies received, by place in the window: ordered by rank, then as sent. Each is
        at its index among the copies of its expert.
      lists: see `lplb_jax.reference.exchange`.
      sizes: the copies received from every rank.
    """

    rank: Int32[Array, "n_rows most"]
    copy: Int32[Array, "n_rows most"]
    order: Int32[Array, "n_rows most"]
    sent: Int32[Array, " n_sent"]
    nth: Int32[Array, " n_rows"]
    received: Int32[Array, "room most"]
    lists: Int32[Array, "lists ep_size"]
    sizes: Int32[Array, " ep_size"]


def slots_by_row(
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    *,
    ep_size: int,
    room: int,
) -> Rows:
    """The slot of each row on its rank; slots_per_rank for rows without a slot."""
    n_physical, n_logical = len(phy2log), len(log2phy)
    n_slots, n_local = n_physical // ep_size, -(-n_logical // ep_size)
    home = log2phy[:, 0].at[phy2log].get(mode="fill", fill_value=-1)
    filled = (phy2log >= 0) & (phy2log < n_logical)
    at_home = filled & (home == jnp.arange(n_physical, dtype=jnp.int32))

    def rows(held: Array, n_rows: int) -> Rows:
        held = held.reshape(ep_size, n_slots)
        row = jnp.where(held, jnp.cumsum(held, axis=1, dtype=jnp.int32) - 1, n_rows)
        rank = jnp.arange(ep_size, dtype=jnp.int32)[:, None]
        slot = jnp.broadcast_to(jnp.arange(n_slots, dtype=jnp.int32), held.shape)
        none = varying_as(jnp.full((ep_size, n_rows), n_slots, jnp.int32), row)
        return none.at[rank, row].set(slot, mode="drop")

    return jnp.concatenate([rows(at_home, n_local), rows(filled & ~at_home, room)], axis=1)


def journeys(
    phy2log: Int32[Array, " n_physical"],
    slots: Rows,
    slot_loads: Int32[Array, " n_physical"],
    me: Int32[Array, ""],
    *,
    n_logical: int,
    most: int,
    n_received: int,
) -> Journeys:
    """The journeys to and from rank `me`. `slots` are those of all rows, see `slots_by_row`."""
    n_ranks, n_rows = slots.shape
    n_local, n_slots = -(-n_logical // n_ranks), len(phy2log) // n_ranks
    room, n_sent = n_rows - n_local, min(n_local, n_received)
    ranks, copies = jnp.arange(n_ranks, dtype=jnp.int32), jnp.arange(room, dtype=jnp.int32)

    def of_rows(values: Array, fill: int) -> Rows:
        by_rank = values.reshape(n_ranks, n_slots)
        return by_rank.at[ranks[:, None], slots].get(mode="fill", fill_value=fill)

    expert = of_rows(phy2log, -1)
    home = varying_as(jnp.full(n_logical, -1, jnp.int32), expert)
    rows = jnp.arange(n_ranks * n_local, dtype=jnp.int32)
    own = expert[:, :n_local].reshape(-1)
    home = home.at[jnp.where(own < 0, n_logical, own)].set(rows, mode="drop")
    expert = expert[:, n_local:].reshape(-1)
    at_home = home.at[jnp.maximum(expert, 0)].get(mode="fill", fill_value=-1)
    peer, row = at_home // n_local, at_home % n_local
    used = of_rows(slot_loads, 0)[:, n_local:].reshape(-1) > 0
    moves = used & (expert >= 0) & (at_home >= 0) & (peer != jnp.repeat(ranks, room))
    number = jnp.arange(len(expert), dtype=jnp.int32)
    earlier = number[None] < number[:, None]

    def ahead(key: Array) -> Array:
        """How many copies with the same key move, of those before each."""
        same = moves[None] & (key[None] == key[:, None])
        return (same & earlier).sum(axis=1, dtype=jnp.int32)

    child = ahead(expert)
    moves &= child < most
    moves &= ahead(peer) < n_received
    moves, peer, row, child = (x.reshape(n_ranks, room) for x in (moves, peer, row, child))

    sizes = (moves[..., None] & (peer[..., None] == ranks)).sum(axis=1, dtype=jnp.int32)
    ahead_there = moves[:, None] & (peer[:, None] == peer[..., None])
    ahead_there &= row[:, None] < row[..., None]
    order = ahead_there.sum(axis=2, dtype=jnp.int32)

    at = jnp.where(moves & (peer == me), row * most + child, n_rows * most)

    def by_row(values: Array) -> Int32[Array, "n_rows most"]:
        none = varying_as(jnp.full(n_rows * most, -1, jnp.int32), at)
        values = jnp.broadcast_to(values, at.shape)
        return none.at[at].set(values, mode="drop").reshape(n_rows, most)

    rank = by_row(ranks[:, None])
    is_sent = (rank >= 0).any(axis=1)
    nth = jnp.where(is_sent, jnp.cumsum(is_sent, dtype=jnp.int32) - 1, n_sent)
    sent = varying_as(jnp.full(n_sent, n_rows, jnp.int32), nth)
    sent = sent.at[nth].set(jnp.arange(n_rows, dtype=jnp.int32), mode="drop")

    before = starts(sizes[me], axis=0)
    place = jnp.where(moves[me], before[peer[me]] + order[me], room)
    received = varying_as(jnp.full((room, most), -1, jnp.int32), place)
    received = received.at[place, child[me]].set(copies, mode="drop")
    lists = [
        sizes[:, me],
        jnp.where(ranks[None] < me, sizes, 0).sum(axis=1, dtype=jnp.int32),
        before,
        jnp.where(ranks[:, None] < me, sizes, 0).sum(axis=0, dtype=jnp.int32),
        starts(sizes[:, me], axis=0),
    ]
    tables = rank, by_row(copies), by_row(order), sent, nth, received
    return Journeys(*tables, jnp.stack(lists), sizes[me])
