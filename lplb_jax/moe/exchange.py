"""Rows of tokens to the ranks of their slots and back, without a sort.

A source writes its rows slot by slot, in the places that `Assignment.position` tells. The rank that
receives them keeps them slot by slot too, and in a slot source by source, as a grouped matrix
product wants them. Everybody knows everybody's counts, so both places of every slice are known to
sender and receiver, and the way back, as well as both derivatives, is the same exchange reversed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._problem import check_axis, check_count, varying_as, varying_over
from lplb_jax.assignment import Assignment
from lplb_jax.loads import sync_loads

TRANSPORTS = ("auto", "padded", "ragged")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_of", "choice_of", "counts"],
    meta_fields=["capacity", "axis_name", "transport"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the rows of one batch go, and come back from.

    Attributes:
      row_of: int32 `[tokens, top_k]`, the place of every choice in what this rank sends, or
        tokens · top_k where it goes nowhere or finds no room.
      choice_of: int32 `[tokens · top_k]`, the choice in every place, numbered token by token.
      counts: int32 `[ep_size, ep_size, slots_per_rank]`: rows from a source for a rank's slot.
      capacity: rows that a rank has room for (static).
      axis_name: the expert-parallel mesh axis (static).
      transport: "ragged" or "padded" (static).
    """

    row_of: jax.Array
    choice_of: jax.Array
    counts: jax.Array
    capacity: int
    axis_name: Any
    transport: str

    @property
    def slot_loads(self) -> jax.Array:
        """Rows for every slot from all sources, those without room included: `[n_physical]`."""
        return self.counts.sum(axis=0).reshape(-1)

    @property
    def overflow(self) -> jax.Array:
        """Rows of all ranks that found no room: int32 scalar."""
        received = self.counts.sum(axis=(0, 2))
        return jnp.maximum(received - self.capacity, 0).sum()

    @property
    def group_sizes(self) -> jax.Array:
        """Rows that this rank received for each of its slots: int32 `[slots_per_rank]`."""
        return _sent(self.counts, self.capacity)[:, lax.axis_index(self.axis_name)].sum(axis=0)


def capacity_for(n_rows: int, ep_size: int, factor: float) -> int:
    """Rows to have room for on every rank: `factor` times the mean, if sources send equally many.

    Args:
      n_rows: rows that every rank sends: its tokens times top_k.
      ep_size: ranks.
      factor: at least 1. `rebalance` lets no rank get more than its lower bound, so a factor just
        above the largest bound over the mean never overflows.

    Returns:
      A multiple of 8, as kernels want it; at most what all ranks send together, rounded up.

    Raises:
      ValueError: the factor is below 1.

    >>> moe.capacity_for(1000, 8, 1.25)
    1256
    """
    if not factor >= 1:
        raise ValueError(f"capacity_factor: expected a number of at least 1, got {factor!r}")
    return -(-min(math.ceil(n_rows * factor), n_rows * ep_size) // 8) * 8


def dispatch(
    tokens: jax.Array,
    assignment: Assignment,
    *,
    axis_name: Any,
    capacity: int,
    transport: str = "auto",
) -> tuple[jax.Array, Plan]:
    """Sends every token to the ranks of its slots. Call it inside `jax.shard_map`.

    Args:
      tokens: `[tokens, hidden]` of this rank.
      assignment: where they go, `[tokens, top_k]`: from `rebalance` or `assign` with
        `positions=True`.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      capacity: rows that every rank has room for, see `capacity_for`. What is above it is dropped,
        last slots first, and counted in `Plan.overflow`. Kernels want a multiple of 8.
      transport: "ragged": `lax.ragged_all_to_all`, exactly the rows there are; for GPUs. "padded":
        `lax.all_to_all` of as many rows for every pair as a source could send; for all backends.
        "auto": "ragged" where the default backend is a GPU.

    Returns:
      `(rows, plan)`: `[capacity, hidden]`, the rows of this rank's slots, `plan.group_sizes` for
      each one after the other, and after them anything, also NaN; and what `combine` needs to send
      them back.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> spec = jax.sharding.PartitionSpec("ep")
    >>> mesh = jax.sharding.Mesh(jax.devices()[:2], "ep")
    >>> def there_and_back(tokens, ids):
    ...     assigned, _ = rebalance(
    ...         ids, None, ring, placement=placement, axis_name="ep", positions=True
    ...     )
    ...     rows, plan = moe.dispatch(tokens, assigned, axis_name="ep", capacity=4)
    ...     return moe.combine(10 * rows, jnp.ones_like(ids, tokens.dtype), plan)
    >>> ring = topologies.ring(2)
    >>> placement = place_experts(None, ring, n_logical=2, ep_size=2, redundants_per_rank=1)
    >>> run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> run(jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[1], [0], [0], [0]])).tolist()
    [[10.0], [20.0], [30.0], [40.0]]
    """
    plan = make_plan(
        tokens, assignment, axis_name=axis_name, capacity=capacity, transport=transport
    )
    return exchange(spread(tokens, plan), plan, "out"), plan


def make_plan(
    tokens: jax.Array, assignment: Assignment, *, axis_name: Any, capacity: int, transport: str
) -> Plan:
    """The first part of `dispatch`, of checked arguments; `spread` and `exchange` are the rest."""
    n_ranks = check_axis(axis_name)
    n_slots = _check_assignment(tokens, assignment, n_ranks)
    capacity = check_count("capacity", capacity)
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if transport == "auto":
        transport = "ragged" if jax.default_backend() == "gpu" else "padded"
    physical, position, counts = assignment
    n_rows = physical.size
    row = (jnp.cumsum(counts) - counts)[physical] + position
    choice_of = jnp.zeros(n_rows, jnp.int32)
    choice_of = choice_of.at[jnp.where(physical >= 0, row, n_rows).reshape(-1)].set(
        jnp.arange(n_rows, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    gathered = sync_loads(counts, axis_name).reshape(n_ranks, n_ranks, n_slots)
    sent = _sent(gathered, capacity)[lax.axis_index(axis_name)].reshape(-1)
    arrives = (physical >= 0) & (position < sent[physical])
    row_of = jnp.where(arrives, row, n_rows)
    return Plan(row_of, choice_of, gathered, capacity, axis_name, transport)


def combine(rows: jax.Array, gates: jax.Array, plan: Plan) -> jax.Array:
    """Sends rows back to their tokens and sums them, weighted.

    Args:
      rows: `[capacity, hidden]`, what became of the rows that `dispatch` gave.
      gates: floats `[tokens, top_k]`, the weight of every choice.
      plan: from `dispatch`.

    Returns:
      `[tokens, hidden]` of `rows`' dtype, summed in float32. Choices that went nowhere or found
      no room add nothing.

    Raises:
      ValueError: at trace time; the message names the argument.

    >>> spec, alone = jax.sharding.PartitionSpec("ep"), np.array([[0]])  # one rank
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "ep")
    >>> placement = place_experts(None, alone, n_logical=2, ep_size=1, redundants_per_rank=1)
    >>> def there_and_back(tokens, ids, gates):
    ...     assigned, _ = rebalance(
    ...         ids, None, alone, placement=placement, axis_name="ep", positions=True
    ...     )
    ...     rows, plan = moe.dispatch(tokens, assigned, axis_name="ep", capacity=8)
    ...     return moe.combine(rows, gates, plan)
    >>> run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> tokens, ids = jnp.array([[1.0], [2.0]]), jnp.array([[0, 1], [1, -1]])
    >>> run(tokens, ids, jnp.array([[0.25, 0.5], [1.0, 9.0]])).tolist()
    [[0.75], [2.0]]
    """
    if rows.ndim != 2 or len(rows) != plan.capacity:
        raise ValueError(
            f"rows: expected [capacity, hidden] with capacity = {plan.capacity}, got "
            f"{list(rows.shape)}"
        )
    if gates.shape != plan.row_of.shape:
        raise ValueError(
            f"gates: expected [tokens, top_k] = {list(plan.row_of.shape)}, got {list(gates.shape)}"
        )
    return _weighted_sum(exchange(rows, plan, "back"), varying_over(gates, plan.axis_name), plan)


def _check_assignment(tokens: jax.Array, assignment: Assignment, n_ranks: int) -> int:
    """Slots per rank."""
    if not isinstance(assignment, Assignment):
        raise TypeError(
            f"assignment: expected a lplb_jax.Assignment, got {type(assignment).__name__}; pass "
            f"positions=True to rebalance"
        )
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise ValueError(
            f"tokens: expected floats [tokens, hidden], got {tokens.dtype} {list(tokens.shape)}"
        )
    physical, position, counts = assignment
    if physical.ndim != 2 or len(physical) != len(tokens) or position.shape != physical.shape:
        raise ValueError(
            f"assignment: expected slots and positions [tokens, top_k] with {len(tokens)} tokens, "
            f"got {list(physical.shape)} and {list(position.shape)}"
        )
    if counts.ndim != 1 or len(counts) % n_ranks:
        raise ValueError(
            f"assignment: expected counts [n_physical], a multiple of the {n_ranks} ranks, got "
            f"{list(counts.shape)}"
        )
    return len(counts) // n_ranks


def spread(tokens: jax.Array, plan: Plan) -> jax.Array:
    """Every choice's token, in the order they are sent: `[tokens · top_k, hidden]`."""
    return _spread(varying_over(tokens, plan.axis_name), plan)


@jax.custom_vjp
def _spread(tokens: jax.Array, plan: Plan) -> jax.Array:
    return tokens[plan.choice_of // plan.row_of.shape[1]]


def _spread_forward(tokens: jax.Array, plan: Plan) -> tuple[jax.Array, Plan]:
    return _spread(tokens, plan), plan


def _spread_backward(plan: Plan, slope: jax.Array) -> tuple[jax.Array, None]:
    # Every choice has one place: a gather and a sum, where autodiff would scatter and add.
    return _picked(slope, plan).astype(jnp.float32).sum(axis=1).astype(slope.dtype), None


_spread.defvjp(_spread_forward, _spread_backward)


def _picked(rows: jax.Array, plan: Plan) -> jax.Array:
    """The row of every choice: `[tokens, top_k, hidden]`, zeros where it went nowhere."""
    return rows.at[plan.row_of].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _weighted_sum(rows: jax.Array, gates: jax.Array, plan: Plan) -> jax.Array:
    picked = _picked(rows, plan).astype(jnp.float32)
    return (picked * gates[..., None].astype(jnp.float32)).sum(axis=1).astype(rows.dtype)


def _weighted_sum_forward(
    rows: jax.Array, gates: jax.Array, plan: Plan
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _weighted_sum(rows, gates, plan), (rows, gates, plan)


def _weighted_sum_backward(saved: tuple[Any, ...], slope: jax.Array) -> tuple[Any, ...]:
    rows, gates, plan = saved
    weight = gates.reshape(-1)[plan.choice_of].astype(jnp.float32)
    of_rows = slope[plan.choice_of // gates.shape[1]].astype(jnp.float32) * weight[:, None]
    of_gates = _picked(rows, plan).astype(jnp.float32) * slope[:, None].astype(jnp.float32)
    return of_rows.astype(rows.dtype), of_gates.sum(axis=-1).astype(gates.dtype), None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


class _Slices(NamedTuple):
    """One side of an exchange: int32 `[ep_size, slots_per_rank]` each, by peer and slot."""

    starts: jax.Array
    sizes: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(rows: jax.Array, plan: Plan, way: str) -> jax.Array:
    """Rows of sources to ranks ("out": `[capacity, …]`) or of ranks to sources ("back")."""
    me = lax.axis_index(plan.axis_name)
    sent_starts, received_starts = _sent_starts(plan.counts), _received_starts(plan.counts)
    sent = _sent(plan.counts, plan.capacity)
    source = _Slices(sent_starts[me], sent[me])
    receiver = _Slices(received_starts[:, me], sent[:, me])
    if way == "out":
        here, there, n_out = source, receiver, plan.capacity
        starts_there = received_starts[me]
    else:
        here, there, n_out = receiver, source, plan.choice_of.size
        starts_there = sent_starts[:, me]
    if plan.transport == "padded":
        most = min(plan.choice_of.size, plan.capacity)
        return _padded(rows, here, there, n_out, most, plan.axis_name)
    return _ragged(rows, here, there, starts_there, n_out, plan.axis_name)


def _exchange_forward(rows: jax.Array, plan: Plan, way: str) -> tuple[jax.Array, Plan]:
    return exchange(rows, plan, way), plan


def _exchange_backward(way: str, plan: Plan, slope: jax.Array) -> tuple[jax.Array, None]:
    return exchange(slope, plan, "back" if way == "out" else "out"), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _sent(counts: jax.Array, capacity: int) -> jax.Array:
    """The counts without the rows that find no room: those that come last."""
    return jnp.clip(capacity - _received_starts(counts), 0, counts)


def _sent_starts(counts: jax.Array) -> jax.Array:
    """Where slices start in their source's rows: rank by rank, slot by slot."""
    rows = counts.reshape(len(counts), -1)
    return (jnp.cumsum(rows, axis=1) - rows).reshape(counts.shape)


def _received_starts(counts: jax.Array) -> jax.Array:
    """Where slices start in their receiver's rows: slot by slot, source by source."""
    rows = counts.transpose(1, 2, 0)
    flat = rows.reshape(len(counts), -1)
    return (jnp.cumsum(flat, axis=1) - flat).reshape(rows.shape).transpose(2, 0, 1)


def _ragged(
    rows: jax.Array,
    here: _Slices,
    there: _Slices,
    starts_there: jax.Array,
    n_out: int,
    axis_name: Any,
) -> jax.Array:
    # XLA moves a piece by one block of threads. It takes some 300 to fill the links, and equal
    # ones: whole slices would make all others wait for that of the busiest expert.
    n_ranks, n_slots = here.sizes.shape
    n_spare = -(-512 // n_ranks)

    def cut(sizes: jax.Array) -> tuple[jax.Array, ...]:
        per_piece = jnp.maximum(-(-sizes.sum(axis=1) // n_spare), 1)
        return _cut(sizes, per_piece, n_slots + n_spare)

    slot, offsets, lengths = cut(here.sizes)
    empty = lax.empty((n_out, *rows.shape[1:]), rows.dtype)
    return lax.ragged_all_to_all(
        rows,
        varying_as(empty, rows),
        (_of_slot(here.starts, slot) + offsets).reshape(-1),
        lengths.reshape(-1),
        (_of_slot(starts_there, slot) + offsets).reshape(-1),
        cut(there.sizes)[2].reshape(-1),
        axis_name=axis_name,
    )


def _padded(
    rows: jax.Array, here: _Slices, there: _Slices, n_out: int, most: int, axis_name: Any
) -> jax.Array:
    """`most`: the most rows that one rank can send to another."""
    blocks = rows.at[_places(here, most, len(rows))].get(mode="fill", fill_value=0)
    blocks = lax.all_to_all(blocks, axis_name, 0, 0)
    empty = jnp.zeros_like(rows, shape=(n_out, *rows.shape[1:]))
    return empty.at[_places(there, most, n_out)].set(blocks, mode="drop")


def _places(slices: _Slices, most: int, nowhere: int) -> jax.Array:
    """The row of every place in the blocks of a padded exchange: int32 `[ep_size, most]`."""
    one = jnp.ones(len(slices.sizes), jnp.int32)
    slot, offsets, lengths = _cut(slices.sizes, one, most)
    return jnp.where(lengths > 0, _of_slot(slices.starts, slot) + offsets, nowhere)


def _cut(sizes: jax.Array, per_piece: jax.Array, n_pieces: int) -> tuple[jax.Array, ...]:
    """Cuts the slices of every peer into pieces of at most `per_piece` rows.

    Returns int32 `[ep_size, n_pieces]`: the slot of every piece, where in its slice it starts, and
    its rows; 0 for those that are not needed.
    """
    pieces = -(-sizes // per_piece[:, None])
    ends = jnp.cumsum(pieces, axis=1)
    piece = jnp.arange(n_pieces, dtype=jnp.int32)
    slot = (piece[:, None] >= ends[:, None]).sum(axis=2, dtype=jnp.int32)
    slot = jnp.minimum(slot, sizes.shape[1] - 1)
    offsets = (piece - _of_slot(ends - pieces, slot)) * per_piece[:, None]
    lengths = jnp.clip(_of_slot(sizes, slot) - offsets, 0, per_piece[:, None])
    return slot, offsets, lengths


def _of_slot(array: jax.Array, slot: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, slot, axis=1)
