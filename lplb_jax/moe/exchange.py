"""Sends tokens to the ranks of their slots and back, once each, without a sort.

Each token is sent at most once per rank and expanded there to a row for each choice that the rank
serves. The experts' results for these rows are summed on that rank and returned as one row. Rows
are ordered by slot and within a slot by source: the layout of a grouped GEMM.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lplb_jax._axes import check_axis, varying_over
from lplb_jax._problem import check_array, check_count
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm
from lplb_jax.moe import transports
from lplb_jax.moe.copies import check_reverse, head
from lplb_jax.moe.plan import Plan


def capacity_for(n_rows: int, ep_size: int, factor: float) -> int:
    """The capacity of a rank in rows: `factor` times the mean, if all sources send equally many.

    Args:
      n_rows: rows that every rank sends: its tokens times top_k.
      ep_size: ranks.
      factor: at least 1. `rebalance` lets no rank get more than its lower bound, so a factor just
        above the largest bound over the mean never overflows.

    Returns:
      A multiple of 8, as kernels require; at most what all ranks send together, rounded up.

    Raises:
      TypeError, ValueError: the factor is no static number, or below 1.

    >>> moe.capacity_for(1000, 8, 1.25)
    1256
    """
    n_rows, ep_size = check_count("n_rows", n_rows, least=0), check_count("ep_size", ep_size)
    factor = _check_factor(factor)
    return -(-min(math.ceil(n_rows * factor), n_rows * ep_size) // 8) * 8


def _check_factor(factor: Any) -> Any:
    """`factor` as a static number, which may have been a scalar array."""
    is_array = isinstance(factor, jax.Array | np.ndarray) and factor.ndim == 0
    if is_array and not isinstance(factor, jax.core.Tracer):
        factor = factor.item()
    if not isinstance(factor, int | float | np.integer | np.floating):
        raise TypeError(
            f"capacity_factor: expected a static number, since it sets the sizes of arrays, got "
            f"{factor!r}"
        )
    if not 1 <= factor < math.inf:
        raise ValueError(f"capacity_factor: expected a number of at least 1, got {factor!r}")
    return factor


def dispatch(
    tokens: jax.Array,
    gates: jax.Array,
    assignment: Assignment,
    *,
    axis_name: Any,
    capacity: int,
    transport: transports.TokenTransport = "auto",
    comm: Comm | None = None,
) -> tuple[jax.Array, jax.Array, Plan]:
    """Sends every token to the ranks of its slots. Call it inside `jax.shard_map`.

    Args:
      tokens: `[tokens, hidden]` of this rank; equally many on all ranks.
      gates: floats `[tokens, top_k]`, the weights of a token's choices.
      assignment: their slots, `[tokens, top_k]`: from `rebalance` or `assign` with
        `positions=True`.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      capacity: rows that fit on a rank, see `capacity_for`. Rows beyond it are dropped, last slots
        first, and counted in `Plan.overflow`. Kernels need a multiple of 8.
      transport: "ragged": `lax.ragged_all_to_all`, only the tokens that exist; for GPUs of one
        process. "padded": `lax.all_to_all` with room for all that a source could send to each rank;
        for all backends. "peer": kernels write directly to the memory of other GPUs, in one process
        or several, between hosts by NVSHMEM's put; needs `comm`. "auto": "peer" if `comm` has
        windows with room for these tokens; otherwise "ragged" on GPUs of one process and "padded"
        elsewhere. One warning says why a slower one is used.
      comm: for "peer", from `init_comm` with `max_tokens` and `hidden_bytes`.

    Returns:
      `(rows, row_gates, plan)`: `[capacity, hidden]`, the rows of this rank's slots,
      `plan.group_sizes` for each, consecutively, followed by undefined rows, possibly NaN; the gate
      of every row, `[capacity]`; and what `combine` needs to return them.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> spec = jax.sharding.PartitionSpec("ep")
    >>> mesh = jax.sharding.Mesh(jax.devices()[:2], "ep")
    >>> def there_and_back(tokens, ids, gates):
    ...     assigned, _ = rebalance(
    ...         ids, None, ring, placement=placement, axis_name="ep", positions=True
    ...     )
    ...     rows, row_gates, plan = moe.dispatch(
    ...         tokens, gates, assigned, axis_name="ep", capacity=4
    ...     )
    ...     return moe.combine(row_gates[:, None] * rows, plan)
    >>> ring = topologies.ring(2)
    >>> placement = place_experts(None, ring, n_logical=2, ep_size=2, redundants_per_rank=1)
    >>> run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> tokens, ids = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[1], [0], [0], [0]])
    >>> run(tokens, ids, jnp.full((4, 1), 10.0)).tolist()
    [[10.0], [20.0], [30.0], [40.0]]
    """
    check_reverse("tokens", (tokens, gates))
    n_ranks, capacity = check_dispatch(tokens, gates, assignment, axis_name, capacity)
    carrier = transports.choose_for_tokens(
        transport,
        tokens,
        gates,
        axis_name=axis_name,
        n_ranks=n_ranks,
        capacity=capacity,
        comm=comm,
    )
    counted = carrier.counted(assignment, axis_name, capacity)
    tokens, gates = varying_over(tokens, axis_name), varying_over(gates, axis_name)
    rows, row_gates, _, plan = carrier.dispatch(tokens, gates, assignment, counted)
    return rows, row_gates, plan


def check_dispatch(
    tokens: jax.Array, gates: jax.Array, assignment: Assignment, axis_name: Any, capacity: Any
) -> tuple[int, int]:
    """Returns the number of ranks and the capacity; raises if the arguments are inconsistent."""
    n_ranks = check_axis(axis_name)
    _check_assignment(tokens, gates, assignment, n_ranks)
    return n_ranks, _check_capacity(capacity, n_ranks)


def _check_capacity(capacity: Any, n_ranks: int) -> int:
    """Raises unless int32 can number the rows of all ranks."""
    capacity = check_count("capacity", capacity)
    if capacity * n_ranks >= 2**31:
        raise ValueError(
            f"capacity: expected less than 2³¹ rows on all {n_ranks} ranks, got {capacity} on each"
        )
    return capacity


def combine(rows: jax.Array, plan: Plan) -> jax.Array:
    """Returns rows to their tokens and sums them.

    Args:
      rows: `[capacity, hidden]`, the results for the rows of `dispatch`, gates included.
      plan: from `dispatch`.

    Returns:
      `[tokens, hidden]` of `rows`' dtype, summed in float32: first on the rank that served the
      choices, then on the token's. Choices without an expert or without room add nothing.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> spec, alone = jax.sharding.PartitionSpec("ep"), np.array([[0]])  # one rank
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "ep")
    >>> placement = place_experts(None, alone, n_logical=2, ep_size=1, redundants_per_rank=1)
    >>> def there_and_back(tokens, ids, gates):
    ...     assigned, _ = rebalance(
    ...         ids, None, alone, placement=placement, axis_name="ep", positions=True
    ...     )
    ...     rows, row_gates, plan = moe.dispatch(
    ...         tokens, gates, assigned, axis_name="ep", capacity=8
    ...     )
    ...     return moe.combine(row_gates[:, None] * rows, plan)
    >>> run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> tokens, ids = jnp.array([[1.0], [2.0]]), jnp.array([[0, 1], [1, -1]])
    >>> run(tokens, ids, jnp.array([[0.25, 0.5], [1.0, 9.0]])).tolist()
    [[0.75], [2.0]]
    """
    check_array("rows", rows, "[capacity, hidden]")
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected a lplb_jax.moe.Plan, got {type(plan).__name__}; pass the one that "
            f"dispatch returned"
        )
    if rows.ndim != 2 or len(rows) != plan.capacity or rows.shape[1] < 1:
        raise ValueError(
            f"rows: expected [capacity, hidden] with capacity = {plan.capacity} and hidden of at "
            f"least 1, got {list(rows.shape)}"
        )
    check_reverse("rows", rows)
    return plan.home(plan.summed(head(rows, plan.group_sizes.sum(dtype=jnp.int32))))


def _check_assignment(
    tokens: jax.Array, gates: jax.Array, assignment: Assignment, n_ranks: int
) -> None:
    if not isinstance(assignment, Assignment):
        raise TypeError(
            f"assignment: expected a lplb_jax.Assignment, got {type(assignment).__name__}; pass "
            f"positions=True to rebalance"
        )
    check_array("tokens", tokens, "floats [tokens, hidden]")
    check_array("gates", gates, "floats [tokens, top_k]")
    for field, value in zip(assignment._fields, assignment, strict=True):
        check_array(f"assignment.{field}", value, "int32")
    floating = jnp.issubdtype(tokens.dtype, jnp.floating)
    if tokens.ndim != 2 or 0 in tokens.shape or not floating:
        raise ValueError(
            f"tokens: expected floats [tokens, hidden] with at least one token, and hidden of at "
            f"least 1, got {tokens.dtype} {list(tokens.shape)}"
        )
    physical, position, counts = assignment
    if physical.ndim != 2 or len(physical) != len(tokens) or position.shape != physical.shape:
        raise ValueError(
            f"assignment: expected slots and positions [tokens, top_k] with {len(tokens)} tokens, "
            f"got {list(physical.shape)} and {list(position.shape)}"
        )
    if physical.shape[1] < 1:
        raise ValueError(
            f"assignment: expected top_k of at least 1, got slots {list(physical.shape)}"
        )
    if counts.ndim != 1 or len(counts) % n_ranks:
        raise ValueError(
            f"assignment: expected counts [n_physical], a multiple of the {n_ranks} ranks, got "
            f"{list(counts.shape)}"
        )
    if gates.shape != physical.shape or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(
            f"gates: expected floats [tokens, top_k] = {list(physical.shape)}, got {gates.dtype} "
            f"{list(gates.shape)}"
        )
