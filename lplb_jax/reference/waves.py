"""The phases of the waves, along a topology and on any placement.

A plan describes what moves where, in any form that `levels` and `push` understand. A proven bound
limits the load of every rank; ranks above their limit pass their excess on to others until none is
above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32

from lplb_jax.reference.sums import ceil_mean

# Every rank's excess over its limit; the plan.
Excess = Int32[Array, " n_ranks"]
Moving = Any


def mean_load(
    load: Int32[Array, " n_ranks"], unseen: Bool[Array, " n_ranks"], target: Int32[Array, ""]
) -> Int32[Array, ""]:
    """The target, raised to the mean load of the unseen ranks, which are all at or above it."""
    return target + ceil_mean(jnp.where(unseen, load - target, 0), unseen)


def balance(
    load: Int32[Array, " n_ranks"],
    moving: Moving,
    bound: Array,
    *,
    levels: Callable[[Excess, Moving], tuple[Int32[Array, " n_ranks"], Int32[Array, ""]]],
    push: Callable[[Excess, Moving, Int32[Array, " n_ranks"], Array], tuple[Excess, Moving]],
    allowed: Callable[[Array], Array] = lambda bound: bound,
    proven: Callable[[Array, Bool[Array, " n_ranks"], Array], Array] = mean_load,
) -> tuple[Int32[Array, " n_ranks"], Moving, Array]:
    """Turns any feasible plan and proven bound into a plan in which no rank exceeds the bound.

    `levels` returns the ranks' distances to ranks with room, −1 if there is no path, and the
    largest distance. `push` moves every rank's excess one level down, the deepest level first.
    `allowed(bound)` is the limit of a rank; `proven(load, unseen, bound)` the bound that follows if
    nothing can leave the unseen ranks.
    """

    def phase(state):
        load, moving, bound = state
        excess = load - allowed(bound)
        level, depth = levels(excess, moving)
        unseen = level < 0
        stuck = (unseen & (excess > 0)).any()
        # At depth 0 nothing is pushed.
        left, moving = push(excess, moving, level, jnp.where(stuck, 0, depth))
        bound = jnp.where(stuck, proven(load, unseen, bound), bound)
        return load + (left - excess), moving, bound

    def unfinished(state):
        load, _, bound = state
        return (load > allowed(bound)).any()

    return lax.while_loop(unfinished, phase, (load, moving, bound))


def hand_out(
    load: Int32[Array, " n_ranks"],
    room: Moving,
    bound: Array,
    *,
    levels: Callable[[Excess, Moving], tuple[Int32[Array, " n_ranks"], Int32[Array, ""]]],
    push: Callable[[Excess, Moving, Int32[Array, " n_ranks"], Array], tuple[Excess, Moving]],
) -> tuple[Int32[Array, " n_ranks"], Moving, Array]:
    """`balance` of loads by moving empty places instead of tokens.

    A rank below the bound has spare ones and pushes them along shortest paths to ranks above it. If
    no path is left, no empty place can enter the set of ranks from which a rank above the bound is
    reachable, and the mean load of this set is the next bound.
    """

    def phase(state):
        load, room, bound = state
        spare = bound - load
        level, depth = levels(spare, room)
        seen = level >= 0
        stuck = ~(seen & (spare > 0)).any()
        left, room = push(spare, room, level, jnp.where(stuck, 0, depth))
        return bound - left, room, jnp.where(stuck, mean_load(load, seen, bound), bound)

    def unfinished(state):
        load, _, bound = state
        return (load > bound).any()

    return lax.while_loop(unfinished, phase, (load, room, bound))


def distances(
    excess: Excess, reaches: Callable[[Bool[Array, " n_ranks"]], Bool[Array, " n_ranks"]]
) -> tuple[Int32[Array, " n_ranks"], Int32[Array, ""]]:
    """Distance of every rank to the nearest rank with room, −1 if not reached; and the largest one.

    `reaches(frontier)` returns the ranks with an arc to the frontier. The search ends when all
    ranks with an excess are reached, or no new rank is.
    """

    def reach(state):
        level, depth, _ = state
        hit = (level < 0) & reaches(level == depth)
        found = hit.any()
        return jnp.where(hit, depth + 1, level), depth + found.astype(jnp.int32), found

    def unfinished(state):
        level, _, progress = state
        return ((excess > 0) & (level < 0)).any() & progress

    level = jnp.where(excess < 0, 0, -1)
    # Derived from the excess, not constants: under shard_map they must vary over the same axes.
    depth = excess.max() & 0
    level, depth, _ = lax.while_loop(unfinished, reach, (level, depth, depth == 0))
    return level, depth


def push_levels(
    excess: Excess,
    moving: Moving,
    level: Int32[Array, " n_ranks"],
    depth: Int32[Array, ""],
    push_level: Callable[[Excess, Excess, Moving, Int32[Array, ""]], tuple[Excess, Moving]],
) -> tuple[Excess, Moving]:
    """Runs `push_level` for each level, from the deepest to the first.

    It gets the excess of the level's ranks, and the state.
    """

    def step(state):
        excess, moving, depth = state
        mine = jnp.where(level == depth, jnp.maximum(excess, 0), 0)
        return *push_level(mine, excess, moving, depth), depth - 1

    excess, moving, _ = lax.while_loop(lambda state: state[2] > 0, step, (excess, moving, depth))
    return excess, moving
