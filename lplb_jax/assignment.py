"""Step 4: which physical slot serves every token."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import min_dim

from lplb_jax import _native, reference
from lplb_jax._problem import (
    Problem,
    check_array,
    check_flags,
    check_indices,
    check_loads,
    check_problem,
    check_sources,
)
from lplb_jax.loads import count
from lplb_jax.placement import Placement
from lplb_jax.solver import Split, TileSplit


class Assignment(NamedTuple):
    """Where every token goes, and its place there: what a MoE layer otherwise sorts for.

    Attributes:
      physical_indices: int32 of the indices' shape: physical slots 0 … n_physical − 1, or −1.
      position: int32 of the same shape: the token's place in its slot's list of this source's
        tokens, which are in the order of `indices`; −1 where it has no slot.
      counts: int32 `[n_physical]`, this source's tokens at every slot: the lengths of the lists.
        (`[ep_size, n_physical]` where `indices` hold several sources.)
    """

    physical_indices: jax.Array
    position: jax.Array
    counts: jax.Array


@overload
def assign(
    indices: Any,
    loads: Any,
    split: Split,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    positions: Literal[False] = False,
    n_nodes: int | None = None,
) -> jax.Array: ...


@overload
def assign(
    indices: Any,
    loads: Any,
    split: Split,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    positions: Literal[True],
    n_nodes: int | None = None,
) -> Assignment: ...


@overload
def assign(
    indices: Any,
    loads: Any,
    split: Split,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    positions: bool,
    n_nodes: int | None = None,
) -> jax.Array | Assignment: ...


def assign(
    indices: Any,
    loads: Any,
    split: Split | TileSplit,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    positions: bool = False,
    n_nodes: int | None = None,
) -> jax.Array | Assignment:
    """Maps logical expert indices to physical ones so that every slot gets its quota.

    The tokens of an expert are assigned in a fixed order, exact to the token and without further
    exchange. Along a topology, the order is by source, with the expert's home rank first and its
    replica's rank last, and within a source that of `indices`; the first `quota[home]` tokens go
    home and the rest to the replica. Without a topology, or if `n_nodes` is given, a rank that
    hosts the expert keeps its first tokens, up to its quota; the rest fill the remaining quotas of
    the node, both in the order of ranks, and then those of all nodes. No other rule with these
    quotas keeps more tokens on their own rank or, after that, on their own node.

    Args:
      indices: int32, int64, uint8 or uint16 of any shape: logical expert ids of this source rank.
        Ids that name no expert give −1.
      loads: the tokens per expert that `split` was solved for. int32 `[ep_size, n_logical]`: the
        counts of every source rank; without `axis_name`, `indices` then has a leading axis of
        ep_size, one row per source rank. int32 `[n_logical]`: estimates; each source then splits
        its own tokens in proportion. None: `indices` are all the tokens.
      split: result of `solve`.
      r2o: static topology, see `lplb_jax.topologies`; None for the placement's, or for none.
      placement: where the experts are; None for the given order along r2o.
      axis_name: the expert-parallel mesh axis inside `jax.shard_map`; its index is this source.
      positions: also return every token's position in its slot's list.
      n_nodes: nodes with `ep_size / n_nodes` consecutive ranks each, for the order above, also
        along a topology; None for the placement's if it has no topology.

    Returns:
      int32 of `indices`' shape: physical slots 0 … n_physical − 1, or −1. With `positions`, an
      `Assignment`.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> ids, ring = jnp.array([[0, 0, 1], [0, 0, 1]]), topologies.ring(2)  # tokens of two ranks
    >>> loads = jnp.stack([count_loads(row, 2) for row in ids])
    >>> assign(ids, loads, solve(loads, ring), ring).tolist()  # slots 0 and 1 are on rank 0
    [[0, 0, 2], [0, 3, 2]]
    """
    given, indices = indices, check_indices(indices)
    loads = None if loads is None else check_loads(loads)
    problem = check_problem(loads, r2o, placement, axis_name, n_nodes)
    check_flags(positions=positions)
    is_split = isinstance(split, Split | TileSplit)
    if is_split:
        check_array("split.quota", split.quota, "int32 [n_physical]")
    if not is_split or split.quota.shape != (problem.placement.n_physical,):
        got = list(split.quota.shape) if is_split else type(split).__name__
        raise ValueError(
            f"split: expected a Split with quota [{problem.placement.n_physical}], got {got}"
        )
    if loads is None and axis_name is not None:
        raise ValueError(
            "loads: expected the gathered counts [ep_size, n_logical] with axis_name, "
            "got None; pass sync_loads(count_loads(indices, n_logical), axis_name)"
        )
    check_sources(indices, loads, problem, axis_name)
    assigned = assign_tokens(indices, loads, split.quota, problem, axis_name, positions=positions)
    return returned(given, assigned, positions)


def assign_tokens(
    indices: jax.Array,
    loads: jax.Array | None,
    quota: jax.Array,
    problem: Problem,
    axis_name: Any,
    own: jax.Array | None = None,
    positions: bool = False,
) -> Assignment:
    """`assign` of checked arguments; `own` are the counts of `indices` if known."""
    placement = problem.placement
    proportional = loads is not None and loads.ndim == 1
    if proportional:
        own = count(indices, problem.n_logical) if own is None else own
        counts = own[None]
    elif loads is None:
        # A single source: no tokens come before its own, and its counts do not matter.
        counts = np.zeros((1, problem.n_logical), np.int32)
    else:
        counts = loads

    placement = problem.placement

    def of_source(tokens: jax.Array, rank: jax.Array | np.int32) -> tuple[jax.Array, ...]:
        operands = (tokens, counts, quota, placement.phy2log, placement.log2phy, rank)
        return _native.call(
            "lplb_assign",
            reference.assign,
            *operands,
            workspace=workspace_shape(tokens.size, problem.n_logical),
            ep_size=problem.ep_size,
            node_size=problem.node_size,
            proportional=int(proportional),
            positions=int(positions),
        )

    if axis_name is not None:
        assigned = of_source(indices.reshape(-1), lax.axis_index(axis_name))
    elif proportional or loads is None:
        assigned = of_source(indices.reshape(-1), np.int32(0))
    else:
        sources = indices.reshape(problem.ep_size, -1)
        assigned = jax.vmap(of_source)(sources, jnp.arange(problem.ep_size, dtype=jnp.int32))
    return as_assignment(indices, *assigned, positions=positions)


def as_assignment(
    indices: jax.Array,
    physical: jax.Array,
    position: jax.Array,
    counts: jax.Array,
    *,
    positions: bool,
) -> Assignment:
    """An Assignment of the indices' shape; without `positions` only its first field counts."""
    if positions:
        position = position.reshape(indices.shape)
    return Assignment(physical.reshape(indices.shape), position, counts)


def returned(given: Any, assigned: Assignment, positions: bool) -> jax.Array | Assignment:
    """What the caller of `assign` gets, with the explicit sharding of the indices that he gave."""
    physical = _native.sharded_as(assigned.physical_indices, given)
    if not positions:
        return physical
    return Assignment(physical, _native.sharded_as(assigned.position, given), assigned.counts)


# As kRouteThreads in cuda/route.h says. The workspace is part of the program, which may be traced
# or exported where there is no CUDA module to ask; tests/test_device.py compares the two.
_MOST_WARPS = 16


def workspace_shape(n_tokens: Any, n_logical: int) -> tuple[Any, int]:
    """Tiles, and int32 words of each, for the kernels that assign large batches tile by tile.

    A tile keeps its tokens per expert, and those of the warps before each of its warps.
    """
    words = (_MOST_WARPS + 1) * (n_logical + 1)
    if not isinstance(n_tokens, int):  # Symbolic, under jax.export: comparisons have no answer.
        return min_dim(n_tokens // 4096 + 1, 64), words
    # More tiles count and assign faster, but each sums the counts of all others.
    most = 64 if n_tokens <= 1 << 19 else 128 if n_tokens <= 1 << 22 else 256
    return max(1, min(n_tokens // 4096, most)), words
