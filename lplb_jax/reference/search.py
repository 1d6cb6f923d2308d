"""Breadth-first search over the ranks, for the waves along a topology and on any placement."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32


def distances(
    load: Int32[Array, " n_ranks"],
    target: Int32[Array, ""],
    reaches: Callable[[Bool[Array, " n_ranks"]], Bool[Array, " n_ranks"]],
) -> tuple[Int32[Array, " n_ranks"], Int32[Array, ""]]:
    """Distance of every rank to the nearest rank below the target, −1 where not reached.

    `reaches(frontier)` are the ranks from which an arc leads to one of the frontier. Ends when all
    ranks above the target are reached or nothing new is. Also returns the largest distance.
    """

    def reach(state):
        level, depth, _ = state
        hit = (level < 0) & reaches(level == depth)
        found = hit.any()
        return jnp.where(hit, depth + 1, level), depth + found.astype(jnp.int32), found

    def unfinished(state):
        level, _, progress = state
        return ((load > target) & (level < 0)).any() & progress

    level = jnp.where(load < target, 0, -1)
    # From the target, not a fresh constant: under shard_map they must vary over the same axes.
    depth = target * 0
    level, depth, _ = lax.while_loop(unfinished, reach, (level, depth, depth == 0))
    return level, depth
