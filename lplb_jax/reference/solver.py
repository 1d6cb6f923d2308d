"""The exact integer solver: phased waves on the replica graph.

One group has G ranks. Column d of rank u is an edge from u to the rank dst[u, d] that holds its
copies; `moved[u, d]` of its `cap[u, d]` tokens are served there. We look for the integers that make
the largest rank load as small as possible. This is a single-commodity flow: the optimum is
max over sets S of ⌈(load that cannot leave S) / |S|⌉, and the waves raise a target T to that value
from below, so that T is a proven lower bound at any time.

All arithmetic is int32 in a fixed order. Sums over ranks can pass 2³¹ though no rank's load does;
they are kept as two 16-bit limbs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32, Shaped

from lplb_jax.reference import graph
from lplb_jax.reference.sums import INT32_MAX, ceil_mean, exact_sum
from lplb_jax.reference.waves import balance, distances, push_levels
from lplb_jax.status import Status


def solve(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    *,
    ep_size: int,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
    Int32[Array, " n_groups"],
]:
    """Quotas, largest loads, lower bounds and status of all groups.

    `loads` has a row per source rank (or one in all); `row` is n_logical, or n_logical + 1 with the
    number of ids that named no expert in the last place (see `count`).
    """
    n_logical = log2phy.shape[0]
    group_size, n_columns = r2o.shape
    negative = (loads[:, :n_logical] < 0).any(axis=0)
    invalid = (loads[:, n_logical:] != 0).any()
    total, too_large = exact_sum(jnp.maximum(loads[:, :n_logical], 0), axis=0)
    if n_columns == 0:
        cells = graph.cells_of(phy2log, log2phy, ep_size)
        quota, *values = graph.solve_any(total, too_large, cells)
        max_load, bound, overflow = (value[None] for value in values)
        wrong = graph.misplaced(phy2log, log2phy, cells)
        # Loads of experts without a slot reach no rank, and only make the placement a wrong one.
        status = status_of(overflow, (negative & cells.hosts.any(axis=1)).any(), invalid, wrong)
        return quota, max_load, bound, status

    n_groups = ep_size // group_size
    n_local = n_logical // ep_size
    slots = phy2log.reshape(n_groups, group_size, -1)
    experts = jnp.clip(slots[:, :, :n_local], 0, n_logical - 1)
    own = total[experts]
    group_too_large = too_large[experts].any(axis=(1, 2))

    quota, max_load, bound, overflow = jax.vmap(
        lambda *group: solve_group(*group, r2o, slots.shape[2] - n_local)
    )(own, group_too_large)
    status = status_of(
        overflow, negative[experts].any(axis=(1, 2)), invalid, misplaced(slots, log2phy, r2o)
    )
    return quota.reshape(-1), max_load, bound, status


def status_of(
    overflow: Bool[Array, " n_groups"],
    negative: Bool[Array, "*n_groups"],
    invalid: Bool[Array, ""],
    wrong: Bool[Array, "*n_groups"],
) -> Int32[Array, " n_groups"]:
    """The bits of what was found."""
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
    r2o: Int32[Array, "group_size n_columns"],
    n_redundant: int,
) -> tuple[
    Int32[Array, "group_size slots_per_rank"],
    Int32[Array, ""],
    Int32[Array, ""],
    Bool[Array, ""],
]:
    """Quotas, largest load, lower bound and overflow of one group.

    `own` are the tokens of every rank's own experts; the first `n_redundant` of them have a copy.
    """
    group_size, n_columns = r2o.shape
    rank = jnp.arange(group_size, dtype=jnp.int32)[:, None]
    column = jnp.arange(n_columns)
    dst = jnp.zeros_like(r2o).at[r2o, column].set(rank)

    base, base_too_large = exact_sum(own, axis=1)
    replicated = own[:, :n_redundant].reshape(group_size, -1, n_columns)
    cap = jnp.where(dst == rank, 0, exact_sum(replicated, axis=1)[0])
    # A plan's rank loads never pass this sum, so where it fits nothing in the waves overflows.
    _, most_too_large = exact_sum(
        jnp.concatenate([base[:, None], cap[r2o, column]], axis=1), axis=1
    )
    overflow = too_large | base_too_large.any() | most_too_large.any()

    base = jnp.where(overflow, 0, base)
    moved, load, target = waves(base, jnp.where(overflow, 0, cap), r2o, dst)

    quota = quotas(own, moved, r2o, n_redundant)
    return quota, jnp.where(overflow, INT32_MAX, load.max()), target, overflow


def quotas(
    own: Array, moved: Array, r2o: Int32[Array, "group_size n_columns"], n_redundant: int
) -> Array:
    """Tokens per slot: a column's moved tokens come from its experts in order."""
    group_size, n_columns = r2o.shape
    replicated = own[:, :n_redundant].reshape(group_size, -1, n_columns)
    before = jnp.cumsum(replicated, axis=1, dtype=own.dtype) - replicated
    # Where nothing moves, `before` may have overflowed.
    away = jnp.clip(moved[:, None, :] - before, 0, replicated)
    away = jnp.where(moved[:, None, :] > 0, away, 0).reshape(group_size, n_redundant)
    local = jnp.arange(n_redundant)
    copies = away[r2o[:, local % n_columns], local]
    return jnp.concatenate([own.at[:, :n_redundant].add(-away), copies], axis=1)


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
    """The bounds of the set of all ranks and of the sets of one rank."""
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
    """Every rank pushes its excess one level down, the deepest level first; what is left of it."""
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
    """What a rank's redundant columns hold, from what the columns' owners sent."""
    return sent[r2o, jnp.arange(r2o.shape[1])]


def misplaced(
    slots: Int32[Array, "n_groups group_size slots_per_rank"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
) -> Bool[Array, " n_groups"]:
    """Whether phy2log, log2phy and r2o contradict one another in a group.

    Every own slot must be the first slot of its expert, every redundant slot the second one of the
    expert it copies along r2o, and log2phy name no others: −1 in all further places.
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
