"""rebalance: the steps in sequence, on one rank and across ranks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32, Integer

from lplb_jax.reference.assignment import assign
from lplb_jax.reference.batch_copies import place
from lplb_jax.reference.loads import count, sync
from lplb_jax.reference.solver import solve, solve_costs


def rebalance(
    indices: Integer[Array, " tokens"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    *,
    ep_size: int,
    node_size: int,
    positions: int,
    fan_out: int,
) -> tuple[Int32[Array, "..."], ...]:
    """The results of `assign`, then of `solve`, for the tokens of a whole batch.

    If `fan_out` is not 0, copies are chosen first, see `solve_copies`; their tables come last.
    """
    counts = count(indices, n_logical=log2phy.shape[0])[None]
    rank = jnp.int32(0)
    sizes = {"ep_size": ep_size, "node_size": node_size, "positions": positions}
    return _balance(indices, counts, phy2log, log2phy, r2o, rank, sizes, fan_out)


def synced_rebalance(
    indices: Integer[Array, " tokens"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    rank: Int32[Array, ""],
    *,
    axis_name: Any,
    comm: int,
    ep_size: int,
    node_size: int,
    positions: int,
    fan_out: int,
) -> tuple[Int32[Array, "..."], ...]:
    """`rebalance` inside shard_map, where the other ranks of `axis_name` have tokens too."""
    own = count(indices, n_logical=log2phy.shape[0])
    counts = sync(own, rank, axis_name=axis_name, comm=comm)
    sizes = {"ep_size": ep_size, "node_size": node_size, "positions": positions}
    return _balance(indices, counts, phy2log, log2phy, r2o, rank, sizes, fan_out)


def rebalance_costs(
    indices: Integer[Array, " tokens"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    base_load: Int32[Array, " ep_size"],
    *,
    ep_size: int,
    node_size: int,
    positions: int,
    tile: int,
) -> tuple[Int32[Array, "..."], ...]:
    """`rebalance` by `solve_costs`."""
    counts = count(indices, n_logical=log2phy.shape[0])[None]
    rank = jnp.int32(0)
    sizes = {"ep_size": ep_size, "node_size": node_size, "positions": positions}
    return _balance_costs(indices, counts, phy2log, log2phy, r2o, base_load, rank, sizes, tile)


def synced_rebalance_costs(
    indices: Integer[Array, " tokens"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    base_load: Int32[Array, " ep_size"],
    rank: Int32[Array, ""],
    *,
    axis_name: Any,
    comm: int,
    ep_size: int,
    node_size: int,
    positions: int,
    tile: int,
) -> tuple[Int32[Array, "..."], ...]:
    """`rebalance_costs` inside shard_map, where the other ranks of `axis_name` have tokens too."""
    own = count(indices, n_logical=log2phy.shape[0])
    counts = sync(own, rank, axis_name=axis_name, comm=comm)
    sizes = {"ep_size": ep_size, "node_size": node_size, "positions": positions}
    return _balance_costs(indices, counts, phy2log, log2phy, r2o, base_load, rank, sizes, tile)


def solve_copies(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    *,
    ep_size: int,
    fan_out: int,
) -> tuple[Int32[Array, "..."], ...]:
    """The results of `solve` over copies for these loads, then those of `place_copies`.

    `solve` starts from the split with which the copies were found: the optimum is not far then.
    """
    options = {"ep_size": ep_size, "fan_out": fan_out}
    phy2log, log2phy, logcnt, start = place(loads, phy2log, log2phy, **options)
    split = solve(loads, phy2log, log2phy, r2o, ep_size=ep_size, start=start)
    return *split, phy2log, log2phy, logcnt


def _balance(indices, counts, phy2log, log2phy, r2o, rank, sizes, fan_out):
    tables = ()
    operands = counts, phy2log, log2phy, r2o
    if fan_out > 0:
        results = solve_copies(*operands, ep_size=sizes["ep_size"], fan_out=fan_out)
        split, tables = results[:4], results[4:]
        phy2log, log2phy, _ = tables
    else:
        split = solve(*operands, ep_size=sizes["ep_size"])
    tokens = assign(indices, counts, split[0], phy2log, log2phy, rank, proportional=0, **sizes)
    return *tokens, *split, *tables


def _balance_costs(indices, counts, phy2log, log2phy, r2o, base_load, rank, sizes, tile):
    tables = phy2log, log2phy
    split = solve_costs(counts, *tables, r2o, base_load, ep_size=sizes["ep_size"], tile=tile)
    tokens = assign(indices, counts, split[0], *tables, rank, proportional=0, **sizes)
    return *tokens, *split
