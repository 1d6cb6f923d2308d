"""Tokens to the ranks of their slots and back, each once, without a sort.

A token goes to a rank once, however many of its choices the rank serves; there it is copied to a
row for each. What the experts made of those rows is summed there, too, and travels back as one.
The rows stand slot by slot, and in a slot source by source: the layout of a grouped GEMM.
A source knows everybody's counts, and from `Assignment.position` the row of each of its choices:
it sends the numbers of the rows beside the token.

The exchanges there and back are each other's transposes, as copying and adding up are: derivatives
are made of the same parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._axes import check_axis, varying_as, varying_over
from lplb_jax._problem import check_count
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm
from lplb_jax.loads import sync_loads
from lplb_jax.moe import transports
from lplb_jax.moe.copies import (
    Copies,
    add,
    check_reverse,
    choice_at,
    copy,
    custom_vjp,
    head,
    numbers,
)
from lplb_jax.moe.peer import PeerPlan, dispatched
from lplb_jax.moe.plan import Counted, is_first, rows_of_choices, starts


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes"],
    meta_fields=["n_sent", "n_received", "axis_name", "transport"],
)
@dataclasses.dataclass(frozen=True)
class SendLists:
    """SendLists of tokens, one from every rank to every other.

    "ragged": one begins where the one before ends. "padded": all have equal room.

    Attributes:
      sizes: int32 `[ep_size, ep_size]`: tokens from a source to a rank.
      n_sent: room for what a source sends, rank by rank (static).
      n_received: room for what a rank receives, source by source (static).
      axis_name: the expert-parallel mesh axis (static).
      transport: "ragged" or "padded" (static).
    """

    sizes: jax.Array
    n_sent: int
    n_received: int
    axis_name: Any
    transport: str

    @property
    def starts_sent(self) -> jax.Array:
        """Of the shape of sizes: where a list begins in what its source sends."""
        if self.transport == "padded":
            n_ranks = len(self.sizes)
            room = self.n_sent // n_ranks
            return jnp.broadcast_to(room * numbers(n_ranks)[None], self.sizes.shape)
        return starts(self.sizes, axis=1)

    def arrived(self, rank: Any) -> jax.Array:
        """bool `[n_received]`: where in what a rank receives there are tokens."""
        sizes = self.sizes[:, rank]
        if self.transport == "padded":
            room = self.n_received // len(sizes)
            return (numbers(room)[None] < sizes[:, None]).reshape(-1)
        return numbers(self.n_received) < sizes.sum(dtype=jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lists", "sent", "row_of", "choice_of", "counts", "order"],
    meta_fields=["capacity"],
)
@dataclasses.dataclass(frozen=True)
class Plan(Counted):
    """Where the tokens of one batch go, and come back from.

    Attributes:
      lists: what goes from rank to rank.
      sent: the tokens' places in what this rank sends.
      row_of: int32 `[n_received, top_k]`, the row of every choice of the tokens that it receives;
        capacity for those that are others' or none.
      choice_of: int32 `[capacity]`, the choice, numbered token by token, that a row serves; of no
        meaning past the last row.
      counts: int32 `[ep_size, ep_size, slots_per_rank]`: rows from a source for a rank's slot.
      order: int32 `[ep_size, groups]`: the slot whose rows each group of a rank has, slots_per_rank
        for none; None for all slots one after the other.
      capacity: rows that a rank has room for (static).
    """

    lists: SendLists
    sent: Copies
    row_of: jax.Array
    choice_of: jax.Array
    counts: jax.Array
    order: jax.Array | None
    capacity: int

    @property
    def axis_name(self) -> Any:
        """The expert-parallel mesh axis."""
        return self.lists.axis_name

    @property
    def received(self) -> Copies:
        """The rows of the tokens that this rank receives."""
        return Copies(self.choice_of // self.row_of.shape[1], self.row_of)

    @property
    def choices(self) -> Copies:
        """The rows of those tokens' choices, one each at most."""
        return Copies(self.choice_of, self.row_of.reshape(-1, 1))

    def summed(self, rows: jax.Array) -> jax.Array:
        """The sums of this rank's rows of every token that it received."""
        return add(rows, self.received)

    def home(self, sums: jax.Array) -> jax.Array:
        """Those sums, on their tokens' ranks and added up there."""
        return add(exchange(sums, self.lists, "back"), self.sent)


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
    gates: jax.Array,
    assignment: Assignment,
    *,
    axis_name: Any,
    capacity: int,
    transport: transports.TokenTransport = "auto",
    comm: Comm | None = None,
) -> tuple[jax.Array, jax.Array, Plan | PeerPlan]:
    """Sends every token to the ranks of its slots. Call it inside `jax.shard_map`.

    Args:
      tokens: `[tokens, hidden]` of this rank; equally many on all ranks.
      gates: floats `[tokens, top_k]`, the weights of a token's choices.
      assignment: where they go, `[tokens, top_k]`: from `rebalance` or `assign` with
        `positions=True`.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      capacity: rows that every rank has room for, see `capacity_for`. What is above it is dropped,
        last slots first, and counted in `Plan.overflow`. Kernels want a multiple of 8.
      transport: "ragged": `lax.ragged_all_to_all`, exactly the tokens there are; for GPUs of one
        process, or of several processes of one host where JAX and NCCL can (jaxlib 0.11.1, NCCL
        2.29.7, at most 32 ranks). "padded": `lax.all_to_all` of as many for every pair as a source
        could send; for all backends. "auto": "ragged" where the default backend is a GPU and JAX
        has one process, else "padded". "peer": the GPUs write to one another's memory themselves,
        in one process or several of one host; needs `comm`.
      comm: for "peer", from `init_comm` with `max_tokens` and `hidden_bytes`.

    Returns:
      `(rows, row_gates, plan)`: `[capacity, hidden]`, the rows of this rank's slots,
      `plan.group_sizes` for each one after the other, and after them anything, also NaN; the gate
      of every row, `[capacity]`; and what `combine` needs to send them back.

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
    chosen = transports.choose_for_tokens(transport, n_ranks)
    if chosen == "peer":
        return dispatched(tokens, gates, assignment, axis_name, capacity, comm)
    plan = make_plan(assignment, axis_name, capacity, chosen)
    tokens, gates = varying_over(tokens, axis_name), varying_over(gates, axis_name)
    rows = copy(exchange(copy(tokens, plan.sent), plan.lists, "there"), plan.received)
    gates = exchange(copy(gates, plan.sent), plan.lists, "there")
    return rows, copy(gates.reshape(-1), plan.choices), plan


def check_dispatch(
    tokens: jax.Array, gates: jax.Array, assignment: Assignment, axis_name: Any, capacity: Any
) -> tuple[int, int]:
    """The number of ranks, and the capacity; raises where the arguments do not fit."""
    n_ranks = check_axis(axis_name)
    _check_assignment(tokens, gates, assignment, n_ranks)
    return n_ranks, _check_capacity(capacity, n_ranks)


def make_plan(
    assignment: Assignment,
    axis_name: Any,
    capacity: int,
    transport: str,
    order: jax.Array | None = None,
) -> Plan:
    """Of checked arguments; exchanges counts and the numbers of rows, no tokens yet."""
    n_ranks = lax.axis_size(axis_name)
    n_slots = len(assignment.counts) // n_ranks
    me = lax.axis_index(axis_name)
    counts = sync_loads(assignment.counts, axis_name).reshape(n_ranks, n_ranks, n_slots)
    rank, row = rows_of_choices(assignment, counts, order, me, capacity)

    goes = jnp.where(row < 0, n_ranks, rank)[..., None] == numbers(n_ranks)[None, None]
    goes = goes.any(axis=1).astype(jnp.int32)
    sizes = sync_loads(goes.sum(axis=0, dtype=jnp.int32), axis_name)
    n_tokens, top_k = row.shape
    if transport == "padded":
        n_sent = n_received = n_ranks * min(n_tokens, capacity)
    else:
        n_sent, n_received = n_tokens * min(n_ranks, top_k), min(n_tokens * n_ranks, capacity)
    lists = SendLists(sizes, n_sent, n_received, axis_name, transport)
    before = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - goes
    place = jnp.take_along_axis(lists.starts_sent[me][None] + before, rank, axis=1)
    place = jnp.where(is_first(rank, row >= 0), place, n_sent)
    sent = Copies(choice_at(place, n_sent) // top_k, place)

    # A rank serves those choices of a received token whose rows are its own.
    row = exchange(copy(row, sent), lists, "there") - me * capacity
    here = lists.arrived(me)[:, None] & (row >= 0) & (row < capacity)
    row = jnp.where(here, row, capacity)
    return Plan(lists, sent, row, choice_at(row, capacity), counts, order, capacity)


def _check_capacity(capacity: Any, n_ranks: int) -> int:
    """Rows of all ranks are numbered in int32."""
    capacity = check_count("capacity", capacity)
    if capacity * n_ranks >= 2**31:
        raise ValueError(
            f"capacity: expected less than 2³¹ rows on all {n_ranks} ranks, got {capacity} on each"
        )
    return capacity


def combine(rows: jax.Array, plan: Plan | PeerPlan) -> jax.Array:
    """Sends rows back to their tokens and sums them.

    Args:
      rows: `[capacity, hidden]`, what became of the rows that `dispatch` gave, gates included.
      plan: from `dispatch`.

    Returns:
      `[tokens, hidden]` of `rows`' dtype, summed in float32: first on the rank that served the
      choices, then on the token's. Choices that went nowhere or found no room add nothing.

    Raises:
      ValueError: at trace time; the message names the argument.

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
    if rows.ndim != 2 or len(rows) != plan.capacity:
        raise ValueError(
            f"rows: expected [capacity, hidden] with capacity = {plan.capacity}, got "
            f"{list(rows.shape)}"
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
    floating = jnp.issubdtype(tokens.dtype, jnp.floating)
    if tokens.ndim != 2 or len(tokens) < 1 or not floating:
        raise ValueError(
            f"tokens: expected floats [tokens, hidden] with at least one token, got {tokens.dtype} "
            f"{list(tokens.shape)}"
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
    if gates.shape != physical.shape or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(
            f"gates: expected floats [tokens, top_k] = {list(physical.shape)}, got {gates.dtype} "
            f"{list(gates.shape)}"
        )


@custom_vjp(2)
def exchange(array: jax.Array, lists: SendLists, way: str) -> jax.Array:
    """`[n_sent, …]` of sources to `[n_received, …]` of ranks ("there"), or the other way ("back").

    Where there are no tokens there is anything.
    """
    if lists.transport == "padded":
        return lax.all_to_all(array, lists.axis_name, 0, 0, tiled=True)
    me = lax.axis_index(lists.axis_name)
    starts_sent, starts_received = lists.starts_sent, starts(lists.sizes, axis=0)
    source = _Slices(starts_sent[me], lists.sizes[me])
    receiver = _Slices(starts_received[:, me], lists.sizes[:, me])
    if way == "there":
        here, there, n_out, starts_there = source, receiver, lists.n_received, starts_received[me]
    else:
        here, there, n_out, starts_there = receiver, source, lists.n_sent, starts_sent[:, me]
    return _ragged(array, here, there, starts_there, n_out, lists.axis_name)


def _exchange_forward(array: jax.Array, lists: SendLists, way: str) -> tuple[jax.Array, SendLists]:
    return exchange(array, lists, way), lists


def _exchange_backward(way: str, lists: SendLists, ct: jax.Array) -> tuple[jax.Array, None]:
    return exchange(ct, lists, "back" if way == "there" else "there"), None


exchange.defvjp(_exchange_forward, _exchange_backward)


class _Slices(NamedTuple):
    """Parts of an array, one for every peer: int32 `[ep_size]` each."""

    starts: jax.Array
    sizes: jax.Array


def _ragged(
    array: jax.Array,
    here: _Slices,
    there: _Slices,
    starts_there: jax.Array,
    n_out: int,
    axis_name: Any,
) -> jax.Array:
    # XLA moves a piece by one block of threads, of which it takes some hundreds to fill the links.
    n_pieces = -(-512 // len(here.sizes))

    def cut(starts: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = -(-sizes // n_pieces)[:, None]
        offsets = numbers(n_pieces)[None] * length
        lengths = jnp.clip(sizes[:, None] - offsets, 0, length)
        return (starts[:, None] + offsets).reshape(-1), lengths.reshape(-1)

    starts, lengths = cut(*here)
    return lax.ragged_all_to_all(
        array,
        varying_as(lax.empty((n_out, *array.shape[1:]), array.dtype), array),
        starts,
        lengths,
        cut(starts_there, here.sizes)[0],
        cut(*there)[1],
        axis_name=axis_name,
    )
