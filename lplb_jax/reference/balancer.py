"""rebalance where no other rank is involved: the steps one after the other."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32, Integer

from lplb_jax.reference.assignment import assign
from lplb_jax.reference.loads import count
from lplb_jax.reference.solver import solve


def rebalance(
    indices: Integer[Array, " tokens"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    *,
    ep_size: int,
    positions: int,
) -> tuple[Int32[Array, "..."], ...]:
    """The results of `assign`, then those of `solve`, for tokens that are all there are."""
    counts = count(indices, n_logical=log2phy.shape[0])[None]
    split = solve(counts, phy2log, log2phy, r2o, ep_size=ep_size)
    rank = jnp.int32(0)
    routed = assign(
        indices,
        counts,
        split[0],
        log2phy,
        rank,
        ep_size=ep_size,
        proportional=0,
        positions=positions,
    )
    return *routed, *split
