"""The rows of a batch on their ranks, and which tokens go to which rank.

Rows are ordered by group, and within a group by source; a group has the rows of one slot. Rows
without room come last on their rank. `counts` are int32 `[ep_size, ep_size, slots]`: rows from a
source for a rank's slot; `groups` int32 `[ep_size, groups]`: the slot of each group of a rank, or
the number of slots for none.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from lplb_jax._axes import varying_as
from lplb_jax.reference import loads

Choices = Int32[Array, "tokens top_k"]
Counts = Int32[Array, "ep_size ep_size slots"]
# An exchange's `row`, `order` and `lists`, then what follows from the counts alone: the rows with
# room of this rank's groups, the rows of all slots with or without room, and the number of rows
# without room.
Plan = tuple[
    Choices,
    Choices,
    Int32[Array, "lists ep_size"],
    Int32[Array, " groups"],
    Int32[Array, " n_physical"],
    Int32[Array, ""],
]


def plan(
    slot: Choices,
    position: Choices,
    counts: Counts,
    groups: Int32[Array, "ep_size groups"],
    me: Int32[Array, ""],
    *,
    capacity: int,
) -> Plan:
    """The plan of this rank, given the counts of all ranks."""
    n_ranks, n_tokens = len(counts), len(slot)
    ranks = jnp.arange(n_ranks, dtype=jnp.int32)
    rank, row = rows_of_choices(slot, position, counts, groups, me, capacity)
    sizes, order = list_order(rank, (row >= 0) & (rank != me), n_ranks)

    # Between two ranks travel at most as many tokens as there are rows, and as the source has.
    fits = fitting(by_group(counts, groups), capacity)
    room = jnp.minimum(fits.sum(axis=2, dtype=jnp.int32), n_tokens)
    room = jnp.where(ranks[:, None] != ranks, room, 0)
    there, home = starts(room, axis=0), starts(room, axis=1)
    lists = jnp.stack([sizes, there[me], there[:, me], home[:, me], home[me]])
    group_sizes = fits[:, me].sum(axis=0, dtype=jnp.int32)
    return row, order, lists, group_sizes, slot_loads(counts), overflow(counts, capacity)


def synced_plan(
    slot: Choices,
    position: Choices,
    counts: Int32[Array, " n_physical"],
    groups: Int32[Array, "ep_size groups"],
    me: Int32[Array, ""],
    *,
    axis_name: Any,
    capacity: int,
    comm: int,
) -> Plan:
    """`plan`, given this rank's counts only."""
    everyones = loads.sync(counts, me, axis_name=axis_name, comm=comm)
    everyones = everyones.reshape(len(groups), len(groups), -1)
    return plan(slot, position, everyones, groups, me, capacity=capacity)


def rows_of_choices(
    slot: Choices,
    position: Choices,
    counts: Counts,
    groups: Int32[Array, "ep_size groups"] | None,
    me: Array,
    capacity: int,
) -> tuple[Choices, Choices]:
    """The rank that serves every choice of this source, and the choice's row there.

    Rows are numbered over all ranks, `capacity` on each; −1 if there is none. Without `groups`, the
    groups are all slots in order.
    """
    used = jnp.maximum(slot, 0)
    rank = used // counts.shape[2]
    grouped = by_group(counts, groups)
    n_fitting, first = (
        _by_slot(of_groups[me], groups, counts.shape[2]).reshape(-1)[used]
        for of_groups in (fitting(grouped, capacity), _row_starts(grouped))
    )
    arrives = (slot >= 0) & (position < n_fitting)
    return rank, jnp.where(arrives, rank * capacity + first + position, -1)


def list_order(
    rank: Choices, goes: Bool[Array, "tokens top_k"], n_ranks: int
) -> tuple[Int32[Array, " ep_size"], Choices]:
    """The number of tokens that go to each rank, and each token's place among them.

    `goes` says which choices count. A token goes to a rank once: its place is at its first choice
    that the rank serves, −1 at all others.
    """
    ranks = jnp.arange(n_ranks, dtype=jnp.int32)[None, None]
    once = (jnp.where(goes, rank, n_ranks)[..., None] == ranks).any(axis=1).astype(jnp.int32)
    place = jnp.take_along_axis(starts(once, axis=0), rank, axis=1)
    return once.sum(axis=0, dtype=jnp.int32), jnp.where(_is_first(rank, goes), place, -1)


def _is_first(rank: Choices, goes: Bool[Array, "tokens top_k"]) -> Bool[Array, "tokens top_k"]:
    """Whether a choice is its token's first that counts and has this rank."""
    top_k = rank.shape[1]
    same = goes[:, None] & (rank[:, None] == rank[..., None])  # [tokens, top_k, top_k]
    return goes & ~(same & jnp.tril(jnp.ones((1, top_k, top_k), bool), -1)).any(axis=2)


def slot_loads(counts: Counts) -> Int32[Array, " n_physical"]:
    """Rows for every slot from all sources, including rows without room."""
    return counts.sum(axis=0, dtype=jnp.int32).reshape(-1)


def overflow(counts: Counts, capacity: int) -> Int32[Array, ""]:
    """Rows of all ranks that do not fit."""
    received = counts.sum(axis=(0, 2), dtype=jnp.int32)
    return jnp.maximum(received - capacity, 0).sum(dtype=jnp.int32)


def fitting(counts: Counts, capacity: int) -> Counts:
    """The counts of the rows that fit; the last rows of a rank are dropped."""
    return jnp.clip(capacity - _row_starts(counts), 0, counts)


def by_group(counts: Counts, groups: Array | None) -> Int32[Array, "ep_size ep_size groups"]:
    """Reorders the last axis from a rank's slots to its groups."""
    if groups is None:
        return counts
    rank = jnp.arange(len(groups), dtype=jnp.int32)[:, None]
    return counts.at[:, rank, groups].get(mode="fill", fill_value=0)


def _by_slot(of_groups: Array, groups: Array | None, n_slots: int) -> Array:
    """`[ep_size, groups]` -> `[ep_size, n_slots]`; 0 for slots without a group."""
    if groups is None:
        return of_groups
    empty = varying_as(jnp.zeros((len(groups), n_slots), of_groups.dtype), of_groups)
    rank = jnp.arange(len(groups), dtype=jnp.int32)[:, None]
    return empty.at[rank, groups].set(of_groups, mode="drop")


def _row_starts(counts: Counts) -> Counts:
    """Where each source's rows of each slot start on their rank."""
    rows = counts.transpose(1, 2, 0)
    return starts(rows.reshape(len(counts), -1), axis=1).reshape(rows.shape).transpose(2, 0, 1)


def starts(sizes: Array, axis: int) -> Array:
    """The exclusive prefix sums of `sizes` along `axis`."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes
