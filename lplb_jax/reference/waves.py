"""The phases of the waves, along a topology and on any placement.

A plan says how much of what moves where; it may be anything that `levels` and `push` know. A bound
is proven, and tells what every rank may have; the ranks above that hand their excess to others,
until none is above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32

from lplb_jax.reference.sums import ceil_mean

# By how much every rank is above what it may have; what moves.
Excess = Int32[Array, " n_ranks"]
Moving = Any


def mean_load(
    load: Int32[Array, " n_ranks"], unseen: Bool[Array, " n_ranks"], target: Int32[Array, ""]
) -> Int32[Array, ""]:
    """The target, raised to the mean load of the unseen ranks, none of which is below it."""
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
    """From any legal plan and proven bound to a plan in which no rank is above the bound.

    `levels` are the distances of the ranks to those that may have more, −1 where there is no way,
    and the largest of them. `push` lets every rank hand its excess one level down, the deepest of
    so many levels first. `allowed(bound)` is what a rank may have; `proven(load, unseen, bound)`
    the bound that follows where nothing can leave the unseen ranks.
    """

    def phase(state):
        load, moving, bound = state
        excess = load - allowed(bound)
        level, depth = levels(excess, moving)
        unseen = level < 0
        stuck = (unseen & (excess > 0)).any()
        # With depth 0 nothing is pushed.
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
    """`balance` of loads of which not the tokens move but the empty places.

    A rank below the bound has more of them than it needs, and pushes those along shortest paths to
    ranks above. Where no such rank finds a way, nothing gets into the ranks that could be reached
    from, and their mean load is the next bound.
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
    """Distance of every rank to the nearest rank that may have more, −1 where not reached.

    `reaches(frontier)` are the ranks from which an arc leads to one of the frontier. Ends when all
    ranks with an excess are reached or nothing new is. Also returns the largest distance.
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
    # From the excess, not a fresh constant: under shard_map they must vary over the same axes.
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
    """`push_level` for one level after the other, from the deepest to the first.

    It gets what the ranks of the level have to hand on, and the state.
    """

    def step(state):
        excess, moving, depth = state
        mine = jnp.where(level == depth, jnp.maximum(excess, 0), 0)
        return *push_level(mine, excess, moving, depth), depth - 1

    excess, moving, _ = lax.while_loop(lambda state: state[2] > 0, step, (excess, moving, depth))
    return excess, moving
