"""Any placement: experts with any number of slots on any ranks, and the waves that balance them.

A *cell* is an expert on a rank that hosts it. If the rank hosts it twice, the cell is the first of
these slots, which serves all tokens. `tokens[e, r]` of expert e are served on rank r. We minimize
the largest rank load over integers: a transportation problem, whose optimum is
max over sets S of ⌈(load of the experts with all hosts in S) / |S|⌉. As in `solver`, the
waves raise a target to that value from below, so that it is a proven bound at any time.

From rank r an arc leads to every host of every expert with tokens on r. All arcs of such an expert
share its tokens on r, which is why the graph is not a list of edges with capacities.

All arithmetic is int32 in a fixed order, and ranks at the same distance share no cell.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, Shaped

from lplb_jax.reference.base_load import BaseLoad
from lplb_jax.reference.sums import INT32_MAX, ceil_divide, ceil_mean, exact_sum
from lplb_jax.reference.waves import balance, distances, hand_out, push_levels

# A push is divided among at most this many ranks: more take longer than the phases they save.
MAX_SPREAD = 4


class Cells(NamedTuple):
    """The cells of a placement, which depend on it alone."""

    expert: Int32[Array, "ep_size slots_per_rank"]  # n_logical if the slot is not a cell
    slot: Int32[Array, "n_logical ep_size"]  # n_physical if there is no cell
    home: Int32[Array, " n_logical"]  # slot of a cell; n_physical if the expert has none

    @property
    def hosts(self) -> Bool[Array, "n_logical ep_size"]:
        """Whether expert e is on rank r."""
        return self.slot < self.expert.size


def cells_of(
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    ep_size: int,
) -> Cells:
    """The cells. Slots with an invalid expert id are empty.

    The home is the first slot in log2phy if that is a cell of the expert, else the first cell.
    """
    n_logical, n_physical = log2phy.shape[0], phy2log.size
    expert = jnp.where((phy2log >= 0) & (phy2log < n_logical), phy2log, n_logical)
    number = jnp.arange(n_physical, dtype=jnp.int32)
    rank = number // (n_physical // ep_size)
    nowhere = jnp.full((n_logical, ep_size), n_physical, jnp.int32)
    slot = nowhere.at[expert, rank].min(number, mode="drop")
    first = slot.at[expert, rank].get(mode="fill", fill_value=n_physical) == number
    home = jnp.where(names_cell(log2phy, slot, n_physical), log2phy[:, 0], slot.min(axis=1))
    return Cells(jnp.where(first, expert, n_logical).reshape(ep_size, -1), slot, home)


def names_cell(
    log2phy: Int32[Array, "n_logical max_replicas"],
    slot: Int32[Array, "n_logical ep_size"],
    n_physical: int,
) -> Bool[Array, " n_logical"]:
    """Whether the first slot in log2phy is a cell of the expert."""
    return ((slot == log2phy[:, :1]) & (slot < n_physical)).any(axis=1)


def misplaced(
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    cells: Cells,
) -> Bool[Array, ""]:
    """Whether a slot's id is invalid, or log2phy does not start with a cell of the expert.

    The latter includes experts without a slot.
    """
    known = (phy2log >= -1) & (phy2log < len(log2phy))
    return ~(known.all() & names_cell(log2phy, cells.slot, phy2log.size).all())


def solve_any(
    total: Int32[Array, " n_logical"],
    too_large: Bool[Array, " n_logical"],
    base: BaseLoad,
    cells: Cells,
    tile: int,
    start: Int32[Array, " n_physical"] | None = None,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, ""],
    Int32[Array, ""],
    Int32[Array, ""],
    Bool[Array, ""],
]:
    """Quotas, largest load, lower bound, largest load in tokens and overflow.

    `too_large`: whether the total exceeds 2³¹ − 1. `start`: quotas of a feasible split to start
    from, in tiles; None for equal shares.
    """
    overflow = may_overflow(total, too_large, base, cells)
    loads = jnp.where(overflow, 0, total)
    none = base.none_if(overflow)
    tiles, load, target = waves(ceil_divide(loads, tile), none.tiles, cells, start)
    max_load = jnp.where(overflow, INT32_MAX, load.max())
    tokens, max_tokens = tiles, max_load
    if tile > 1:
        tokens, load = fill(loads, tiles, none.tokens, cells, tile)
        max_tokens = jnp.where(overflow, INT32_MAX, load.max())
    return quotas(tokens, total, overflow, cells), max_load, target, max_tokens, overflow


def may_overflow(
    total: Int32[Array, " n_logical"],
    too_large: Bool[Array, " n_logical"],
    base: BaseLoad,
    cells: Cells,
) -> Bool[Array, ""]:
    """Whether some rank could exceed 2³¹ − 1; if not, no rank of any plan does."""
    hosted = jnp.where(cells.hosts, total[:, None], 0)
    _, rank_too_large = exact_sum(jnp.concatenate([hosted, base.tokens[None]]), axis=0)
    found = (too_large & cells.hosts.any(axis=1)).any() | rank_too_large.any()
    return found | base.too_large.any()


def quotas(
    tokens: Shaped[Array, "n_logical ep_size"],
    total: Shaped[Array, " n_logical"],
    overflow: Bool[Array, ""],
    cells: Cells,
) -> Shaped[Array, " n_physical"]:
    """Tokens per slot: its cell's, or, if the loads are too large, all at home."""
    nothing = jnp.zeros(cells.expert.size, total.dtype)
    quota = nothing.at[cells.slot].set(tokens, mode="drop")
    return jnp.where(overflow, nothing.at[cells.home].set(total, mode="drop"), quota)


def waves(
    total: Int32[Array, " n_logical"],
    base: Int32[Array, " ep_size"],
    cells: Cells,
    start: Int32[Array, " n_physical"] | None = None,
) -> tuple[Int32[Array, "n_logical ep_size"], Int32[Array, " ep_size"], Int32[Array, ""]]:
    """Tokens of every cell, rank loads, and the target, which is the lower bound."""
    tokens = even_shares(total, cells.hosts)
    if start is not None:
        shared = cells.hosts.sum(axis=1, dtype=jnp.int32) > 1
        given = start.at[cells.slot].get(mode="fill", fill_value=0)
        tokens = jnp.where(shared[:, None], given, tokens)
    load = base + tokens.sum(axis=0, dtype=jnp.int32)
    bound = first_target(load, tokens, base, cells)
    load, tokens, target = balance(load, tokens, bound, **moves(cells))
    return tokens, load, target


def fill(
    total: Int32[Array, " n_logical"],
    tiles: Int32[Array, "n_logical ep_size"],
    base: Int32[Array, " ep_size"],
    cells: Cells,
    tile: int,
) -> tuple[Int32[Array, "n_logical ep_size"], Int32[Array, " ep_size"]]:
    """Tokens of every cell, and rank loads whose largest is minimal for these tiles.

    The empty places of an expert's tiles are fewer than one tile, so no tile can become empty. They
    move between the expert's cells like tokens.
    """
    held = cells._replace(slot=jnp.where(tiles > 0, cells.slot, cells.expert.size))

    def tokens_beside(room):
        return jnp.where(tiles > 0, (tiles - 1) * tile + (tile - room), 0)

    def load_beside(room):
        return base + tokens_beside(room).sum(axis=0, dtype=jnp.int32)

    all_of_it = (-total) % tile
    room = even_shares(all_of_it, held.hosts)
    load = load_beside(room)
    bound = larger_bound(load, least=load_beside(all_of_it[:, None]))
    load, room, _ = hand_out(load, room, bound, **moves(held))
    return tokens_beside(room), load


def moves(cells: Cells) -> dict[str, Any]:
    """How tokens move between the cells, for `balance`."""
    return {"levels": partial(levels, cells), "push": partial(push, cells)}


def even_shares(
    total: Int32[Array, " n_logical"], hosts: Bool[Array, "n_logical ep_size"]
) -> Int32[Array, "n_logical ep_size"]:
    """Loads divided evenly among the hosts; the first ones get one more."""
    n_hosts = hosts.sum(axis=1, dtype=jnp.int32)[:, None]
    each, more = jnp.divmod(total[:, None], jnp.maximum(n_hosts, 1))
    nth = jnp.cumsum(hosts, axis=1, dtype=jnp.int32) - 1
    return jnp.where(hosts, each + (nth < more).astype(jnp.int32), 0)


def first_target(
    load: Int32[Array, " ep_size"],
    tokens: Int32[Array, "n_logical ep_size"],
    base: Int32[Array, " ep_size"],
    cells: Cells,
) -> Int32[Array, ""]:
    """The bounds of the set of all ranks and of single ranks, from any feasible plan."""
    alone = cells.hosts.sum(axis=1, dtype=jnp.int32) == 1
    stays = base + jnp.where(alone[:, None], tokens, 0).sum(axis=0, dtype=jnp.int32)
    return larger_bound(load, stays)


def larger_bound(
    load: Int32[Array, " ep_size"], least: Int32[Array, " ep_size"]
) -> Int32[Array, ""]:
    """The mean of the loads, or what some rank has at least in any plan."""
    return jnp.maximum(ceil_mean(load, jnp.ones(load.shape, bool)), least.max())


def levels(
    cells: Cells, excess: Int32[Array, " ep_size"], tokens: Int32[Array, "n_logical ep_size"]
) -> tuple[Int32[Array, " ep_size"], Int32[Array, ""]]:
    """`distances` over the arcs from a rank to every host of every expert with tokens on it."""
    serves, hosts = (tokens > 0).astype(jnp.float32), cells.hosts.astype(jnp.float32)
    arc = serves.T @ hosts > 0
    return distances(excess, lambda frontier: (arc & frontier).any(axis=1))


def push(
    cells: Cells,
    excess: Int32[Array, " ep_size"],
    tokens: Int32[Array, "n_logical ep_size"],
    level: Int32[Array, " ep_size"],
    depth: Int32[Array, ""],
) -> tuple[Int32[Array, " ep_size"], Int32[Array, "n_logical ep_size"]]:
    """Every rank pushes its excess one level down, deepest level first; returns what remains.

    A rank divides its excess into parts, as many as the least power of two that gives each of its
    cells with tokens and hosts below one, and the first ones two. No cell sends more than it has.
    """
    n_ranks, n_slots = cells.expert.shape
    rank = jnp.arange(n_ranks, dtype=jnp.int32)
    # Row r: the ranks in cyclic order, starting after r.
    after = (rank[:, None] + rank + 1) % n_ranks

    def push_level(mine, excess, tokens, depth):
        held = tokens.at[cells.expert, rank[:, None]].get(mode="fill", fill_value=0)
        below = (cells.hosts & (level == depth - 1)).any(axis=1)
        sends = (held > 0) & below.at[cells.expert].get(mode="fill", fill_value=False)
        nth_sender = jnp.cumsum(sends, axis=1, dtype=jnp.int32) - 1
        n_senders = sends.sum(axis=1, dtype=jnp.int32)
        n_parts = 1 << (32 - lax.clz(jnp.maximum(n_senders - 1, 0)))
        each, more = mine // n_parts, mine % n_parts

        def part(i):
            return jnp.where(i < n_parts, each + (i < more).astype(jnp.int32), 0)

        def push_slot(k, state):
            tokens, excess = state
            e, i = cells.expert[:, k], nth_sender[:, k]
            amount = jnp.minimum(part(i) + part(i + n_senders), held[:, k])
            amount = jnp.where(sends[:, k], amount, 0)
            to = cells.hosts.at[e[:, None], after].get(mode="fill", fill_value=False)
            to &= level[after] == depth - 1
            to &= jnp.cumsum(to, axis=1, dtype=jnp.int32) <= MAX_SPREAD
            to = jnp.zeros_like(to).at[rank[:, None], after].set(to)  # in the order of the ranks
            nth = jnp.cumsum(to, axis=1, dtype=jnp.int32) - 1
            share, rest = jnp.divmod(amount[:, None], jnp.maximum(nth[:, -1:] + 1, 1))
            parts = jnp.where(to, share + (nth < rest).astype(jnp.int32), 0)
            tokens = tokens.at[e].add(parts, mode="drop")
            tokens = tokens.at[e, rank].add(-amount, mode="drop")
            return tokens, excess + parts.sum(axis=0, dtype=jnp.int32) - amount

        tokens, excess = lax.fori_loop(0, n_slots, push_slot, (tokens, excess))
        return excess, tokens

    return push_levels(excess, tokens, level, depth, push_level)
