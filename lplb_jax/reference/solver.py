"""The exact integer solver: phased waves on the replica graph.

One group has G ranks. Column d of rank u is an edge from u to the rank dst[u, d] that holds its
copies; `moved[u, d]` of its `cap[u, d]` tokens are served there. We minimize the largest rank load
over integers. This is a single-commodity flow: the optimum is
max over sets S of ⌈(load that cannot leave S) / |S|⌉, and the waves raise a target T to that value
from below, so that T is a proven lower bound at any time.

All arithmetic is int32 in a fixed order. Sums over ranks can exceed 2³¹ although no rank's load
does; they are kept as two 16-bit limbs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, Shaped

from lplb_jax.reference import graph
from lplb_jax.reference.base_load import BaseLoad, base_load_of
from lplb_jax.reference.sums import INT32_MAX, ceil_divide, ceil_mean, exact_sum
from lplb_jax.reference.waves import balance, distances, push_levels
from lplb_jax.status import Status


def solve(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    *,
    ep_size: int,
    start: Int32[Array, " n_physical"] | None = None,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
]:
    """Quotas, largest loads, lower bounds and status of all groups.

    `loads` has a row per source rank, or a single row; `row` is n_logical, or n_logical + 1 if the
    number of ids that name no expert comes last (see `count`). `start` (without a topology): quotas
    of a feasible split to start from; None for equal shares.
    """
    nothing = jnp.zeros(ep_size, jnp.int32)
    tables = phy2log, log2phy, r2o
    split = solve_costs(loads, *tables, nothing, ep_size=ep_size, tile=1, start=start)
    return split[:4]


def solve_costs(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    base_load: Int32[Array, " ep_size"],
    *,
    ep_size: int,
    tile: int,
    start: Int32[Array, " n_physical"] | None = None,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
]:
    """`solve` with slots that cost tiles, ⌈quota / tile⌉, and ranks with a `base_load`.

    The largest loads and lower bounds are in tiles. The largest loads in tokens come last; they are
    minimal for the number of tiles of every slot.

    An expert's tokens fill at least ⌈load / tile⌉ tiles, however they are split, and exactly that
    many if all of its slots but one hold whole tiles. So minimizing tiles is a flow of tiles.
    """
    n_logical = log2phy.shape[0]
    group_size, n_columns = r2o.shape
    negative = (loads[:, :n_logical] < 0).any(axis=0)
    invalid = (loads[:, n_logical:] != 0).any()
    total, too_large = exact_sum(jnp.maximum(loads[:, :n_logical], 0), axis=0)
    base = base_load_of(base_load, tile)
    if n_columns == 0:
        cells = graph.cells_of(phy2log, log2phy, ep_size)
        quota, *values = graph.solve_any(total, too_large, base, cells, tile, start)
        max_load, bound, max_tokens, overflow = (value[None] for value in values)
        wrong = graph.misplaced(phy2log, log2phy, cells)
        # Loads of experts without a slot reach no rank; they only invalidate the placement.
        negative = (negative & cells.hosts.any(axis=1)).any() | base.negative.any()
        status = status_of(overflow, negative, invalid, wrong)
        return quota, max_load, bound, status, max_tokens

    n_groups = ep_size // group_size
    n_local = n_logical // ep_size
    slots = phy2log.reshape(n_groups, group_size, -1)
    experts = jnp.clip(slots[:, :, :n_local], 0, n_logical - 1)
    own = total[experts]
    group_too_large = too_large[experts].any(axis=(1, 2))

    base = BaseLoad(*(of_rank.reshape(n_groups, group_size) for of_rank in base))
    quota, max_load, bound, max_tokens, overflow = jax.vmap(
        lambda own, large, base: solve_group(own, large, base, r2o, slots.shape[2] - n_local, tile)
    )(own, group_too_large, base)
    negative = negative[experts].any(axis=(1, 2)) | base.negative.any(axis=1)
    status = status_of(overflow, negative, invalid, misplaced(slots, log2phy, r2o))
    return quota.reshape(-1), max_load, bound, status, max_tokens


def status_of(
    overflow: Bool[Array, " n_groups"],
    negative: Bool[Array, "*n_groups"],
    invalid: Bool[Array, ""],
    wrong: Bool[Array, "*n_groups"],
) -> Int32[Array, " n_groups"]:
    """The status bits for these findings."""
    status = (
        jnp.where(overflow, Status.LOAD_OVERFLOW, 0)
        | jnp.where(negative, Status.NEGATIVE_LOAD, 0)
        | jnp.where(invalid, Status.INVALID_INDEX, 0)
        | jnp.where(wrong, Status.BAD_PLACEMENT, 0)
    )
    return status.astype(jnp.int32)


def solve_group(
    own: Int32[Array, "group_size n_local"],
    too_large: Bool[Array, ""],
    base_load: BaseLoad,
    r2o: Int32[Array, "group_size n_columns"],
    n_redundant: int,
    tile: int,
) -> tuple[
    Int32[Array, "group_size slots_per_rank"],
    Int32[Array, ""],
    Int32[Array, ""],
    Int32[Array, ""],
    Bool[Array, ""],
]:
    """Quotas, largest load, lower bound, largest load in tokens and overflow of one group.

    `own` are the tokens of every rank's own experts; the first `n_redundant` of them have a copy.
    """
    dst = inverse(r2o)
    _, most_too_large = exact_sum(
        jnp.concatenate(
            [own, column_loads(own, r2o, dst, n_redundant)[1], base_load.tokens[:, None]], axis=1
        ),
        axis=1,
    )
    # A plan's rank loads never exceed this sum, so if it fits, nothing in the waves overflows.
    overflow = too_large | most_too_large.any() | base_load.too_large.any()
    base_load = base_load.none_if(overflow)
    loads = jnp.where(overflow, 0, own)

    tiles = ceil_divide(loads, tile)
    cap, _ = column_loads(tiles, r2o, dst, n_redundant)
    base = base_load.tiles + tiles.sum(axis=1, dtype=jnp.int32)
    moved, load, target = waves(base, cap, r2o, dst)
    max_load = max_tokens = jnp.where(overflow, INT32_MAX, load.max())
    away = taken_in_order(tiles[:, :n_redundant], moved)
    if tile > 1:
        away, load = fill(loads, tiles, away, base_load.tokens, r2o, dst, tile)
        max_tokens = jnp.where(overflow, INT32_MAX, load.max())
    return at_slots(own, away, r2o), max_load, target, max_tokens, overflow


def fill(
    own: Int32[Array, "group_size n_local"],
    tiles: Int32[Array, "group_size n_local"],
    away: Int32[Array, "group_size n_redundant"],
    base_load: Int32[Array, " group_size"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
    tile: int,
) -> tuple[Int32[Array, "group_size n_redundant"], Int32[Array, " group_size"]]:
    """The tokens of the `away` tiles, and rank loads whose largest is minimal for these tiles.

    At most one expert of a column has tiles at both ends; the empty places of its last tile can
    still move along the edge.
    """
    n_redundant, n_columns = away.shape[1], r2o.shape[1]
    replicated = own[:, :n_redundant]
    home = tiles[:, :n_redundant] - away
    least = jnp.where(away > 0, replicated - home * tile, 0)
    room = jnp.where((away > 0) & (home > 0), (-replicated) % tile, 0)
    moved, cap = (by_column(part, n_columns) for part in (least, room))
    change = (arrived(moved, r2o) - moved).sum(axis=1, dtype=jnp.int32)
    base = base_load + own.sum(axis=1, dtype=jnp.int32) + change
    moved, load, _ = waves(base, cap, r2o, dst)
    return least + taken_in_order(room, moved), load


def column_loads(
    own: Int32[Array, "group_size n_local"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
    n_redundant: int,
) -> tuple[Int32[Array, "group_size n_columns"], Int32[Array, "group_size n_columns"]]:
    """Capacity out of every rank along its edges, and into it; at most 2³¹ − 1 each."""
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    rank = jnp.arange(len(own), dtype=jnp.int32)[:, None]
    cap = jnp.where(dst == rank, 0, exact_sum(replicated, axis=1)[0])
    return cap, arrived(cap, r2o)


def by_column(
    replicated: Int32[Array, "group_size n_redundant"], n_columns: int
) -> Int32[Array, "group_size n_columns"]:
    """Sums over the experts of a column."""
    of_column = replicated.reshape(len(replicated), -1, n_columns)
    return of_column.sum(axis=1, dtype=replicated.dtype)


def quotas(
    own: Array, moved: Array, r2o: Int32[Array, "group_size n_columns"], n_redundant: int
) -> Array:
    """Tokens per slot: a column's moved tokens come from its experts in order."""
    return at_slots(own, taken_in_order(own[:, :n_redundant], moved), r2o)


def taken_in_order(
    replicated: Shaped[Array, "group_size n_redundant"],
    moved: Shaped[Array, "group_size n_columns"],
) -> Shaped[Array, "group_size n_redundant"]:
    """The tokens of every replicated expert that move, taking a column's experts in order."""
    of_column = replicated.reshape(len(replicated), -1, moved.shape[1])
    before = jnp.cumsum(of_column, axis=1, dtype=replicated.dtype) - of_column
    # If nothing moves, `before` may have overflowed.
    away = jnp.clip(moved[:, None, :] - before, 0, of_column)
    return jnp.where(moved[:, None, :] > 0, away, 0).reshape(replicated.shape)


def at_slots(
    own: Shaped[Array, "group_size n_local"],
    away: Shaped[Array, "group_size n_redundant"],
    r2o: Int32[Array, "group_size n_columns"],
) -> Shaped[Array, "group_size slots_per_rank"]:
    """Tokens per slot; `away` are the tokens of the replicated experts' copies."""
    n_redundant = away.shape[1]
    local = jnp.arange(n_redundant)
    copies = away[r2o[:, local % r2o.shape[1]], local]
    return jnp.concatenate([own.at[:, :n_redundant].add(-away), copies], axis=1)


def inverse(r2o: Int32[Array, "group_size n_columns"]) -> Int32[Array, "group_size n_columns"]:
    """dst: the rank that holds the copies of a rank's column."""
    rank = jnp.arange(r2o.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(r2o).at[r2o, jnp.arange(r2o.shape[1])].set(rank)


def waves(
    base: Int32[Array, " group_size"],
    cap: Int32[Array, "group_size n_columns"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
) -> tuple[Int32[Array, "group_size n_columns"], Int32[Array, " group_size"], Int32[Array, ""]]:
    """Tokens moved along every edge, rank loads, and the target, which is the lower bound."""
    start = first_target(base, cap)
    load, moved, target = balance(base, cap - cap, start, **moves(cap, r2o, dst))
    return moved, load, target


def moves(
    cap: Int32[Array, "group_size n_columns"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
) -> dict[str, Any]:
    """How tokens move along the edges, for `balance`."""
    return {"levels": partial(levels, cap, r2o, dst), "push": partial(push, cap, r2o, dst)}


def first_target(
    base: Int32[Array, " group_size"], cap: Int32[Array, "group_size n_columns"]
) -> Int32[Array, ""]:
    """The bounds of the set of all ranks and of single ranks."""
    everyone = jnp.ones(base.shape, bool)
    return jnp.maximum(ceil_mean(base, everyone), (base - cap.sum(axis=1, dtype=jnp.int32)).max())


def levels(
    cap: Int32[Array, "group_size n_columns"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
    excess: Int32[Array, " group_size"],
    moved: Int32[Array, "group_size n_columns"],
) -> tuple[Int32[Array, " group_size"], Int32[Array, ""]]:
    """`distances` over the residual edges."""
    can_send = moved < cap
    can_return = arrived(moved, r2o) > 0

    def reaches(frontier):
        return ((can_send & frontier[dst]) | (can_return & frontier[r2o])).any(axis=1)

    return distances(excess, reaches)


def push(
    cap: Int32[Array, "group_size n_columns"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
    excess: Int32[Array, " group_size"],
    moved: Int32[Array, "group_size n_columns"],
    level: Int32[Array, " group_size"],
    depth: Int32[Array, ""],
) -> tuple[Int32[Array, " group_size"], Int32[Array, "group_size n_columns"]]:
    """Every rank pushes its excess one level down, deepest level first; returns what remains."""
    n_columns = cap.shape[1]
    column = jnp.arange(n_columns)

    def push_level(mine, excess, moved, depth):
        below = level == depth - 1
        entered = arrived(moved, r2o)
        sent, returned = [], []
        for d in range(n_columns):
            send = jnp.where(below[dst[:, d]], jnp.minimum(mine, (cap - moved)[:, d]), 0)
            mine = mine - send
            back = jnp.where(below[r2o[:, d]], jnp.minimum(mine, entered[:, d]), 0)
            mine = mine - back
            sent.append(send)
            returned.append(back)
        sent, returned = jnp.stack(sent, axis=1), jnp.stack(returned, axis=1)
        got_back = returned[dst, column]
        change = arrived(sent, r2o) + got_back - sent - returned
        return excess + change.sum(axis=1, dtype=jnp.int32), moved + sent - got_back

    return push_levels(excess, moved, level, depth, push_level)


def arrived(
    sent: Shaped[Array, "group_size n_columns"], r2o: Int32[Array, "group_size n_columns"]
) -> Shaped[Array, "group_size n_columns"]:
    """The tokens in a rank's redundant columns, given what the columns' owners sent."""
    return sent[r2o, jnp.arange(r2o.shape[1])]


def misplaced(
    slots: Int32[Array, "n_groups group_size slots_per_rank"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
) -> Bool[Array, " n_groups"]:
    """Whether phy2log, log2phy and r2o contradict one another in a group.

    Every own slot must be the first slot of its expert, and every redundant slot the second slot of
    the expert that it copies along r2o. All further entries of log2phy must be −1.
    """
    n_groups, group_size, slots_per_rank = slots.shape
    n_local = log2phy.shape[0] // (n_groups * group_size)
    local = jnp.arange(slots_per_rank - n_local)
    slot = jnp.arange(slots.size).reshape(slots.shape)
    own, copies = slots[:, :, :n_local], slots[:, :, n_local:]
    n_named = jnp.where(jnp.arange(n_local) < local.size, 2, 1)
    is_padding = jnp.arange(log2phy.shape[1]) >= n_named[:, None]
    known = (slots >= 0) & (slots < log2phy.shape[0])
    wrong = (
        ~known.all(axis=2)
        | (log2phy[own, 0] != slot[:, :, :n_local]).any(axis=2)
        | (log2phy[copies, 1] != slot[:, :, n_local:]).any(axis=2)
        | (is_padding & (log2phy[own] != -1)).any(axis=(2, 3))
        | (copies != own[:, r2o[:, local % r2o.shape[1]], local]).any(axis=2)
    )
    return wrong.any(axis=1)
