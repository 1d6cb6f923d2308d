"""The transport "peer": the GPUs write tokens into one another's memory themselves.

A token's row goes from where it lies into the window of every rank that serves it, with the
numbers of the rows that it becomes there, and from the window into those rows; the sums of rows go
back the same way. There is no send buffer and no kernel between, and a rank's window holds as many
tokens as it can receive, whatever the number of ranks. `cuda/exchange.h` says why nobody overwrites
what another one still reads.

Where a list of tokens begins in a window follows from the counts that all ranks know: between two
ranks there are at most as many tokens as rows, and as the source has.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native, reference
from lplb_jax._axes import varying_over
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm, check_comm
from lplb_jax.loads import sync_loads
from lplb_jax.moe.copies import numbers
from lplb_jax.moe.plan import (
    Counted,
    Plan,
    Transport,
    by_group,
    fitting,
    is_first,
    rows_of_choices,
    starts,
)
from lplb_jax.moe.transfers import ALONE, Beside, beside_rows

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["row", "order", "lists"],
    meta_fields=["capacity", "n_received", "axis_name", "comm", "sms"],
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where this rank's tokens go; see `lplb_jax.reference.exchange`.

    Attributes:
      row, order: int32 `[tokens, top_k]`.
      lists: int32 `[5, ep_size]`.
      capacity: rows of a rank (static).
      n_received: tokens that a rank can receive from others (static).
      axis_name: the expert-parallel mesh axis (static).
      comm: identifier of the communicator (static).
      sms: SMs that move tokens, 0 for all (static).
    """

    row: jax.Array
    order: jax.Array
    lists: jax.Array
    capacity: int
    n_received: int
    axis_name: Any
    comm: int
    sms: int

    def call(self, target: str, specification: Any, *operands: jax.Array) -> Any:
        """The kernel `target`, or its specification where there is none."""
        return _native.call(
            target,
            specification,
            *operands[:2],
            self.row,
            self.order,
            self.lists,
            lax.axis_index(self.axis_name),
            *operands[2:],
            axis_name=self.axis_name,
            capacity=self.capacity,
            n_received=self.n_received,
            comm=self.comm,
            sms=self.sms,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "order", "routing", "came"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class PeerPlan(Plan):
    """Of tokens that ranks write into one another's memory.

    Attributes:
      counts, order, capacity, axis_name: see `Plan`.
      routing: where this rank's tokens go.
      came: what came here: the rows of every token, and how many from every rank.
    """

    routing: Routing
    came: tuple[jax.Array, jax.Array]

    def summed(self, rows: jax.Array) -> jax.Array:
        """The sums of all ranks' rows of this rank's tokens: they travel as they are made."""
        return _back(rows, self.routing, self.came)

    def home(self, sums: jax.Array) -> jax.Array:
        """What `summed` gave is there."""
        return sums


@dataclasses.dataclass(frozen=True)
class Peer(Transport):
    """The GPUs' own way, over the windows of a communicator."""

    name = "peer"
    comm: Comm | None

    @property
    def beside_engines(self) -> bool:
        return self.comm is not None and self.comm.transport == "p2p"

    def why_not(
        self, tokens: jax.Array, gates: jax.Array, axis_name: Any, capacity: int
    ) -> str | None:
        """Windows have room for so much, and kernels move some types."""
        comm = self.comm
        if comm is None or comm.window is None:
            return (
                "transport: 'peer' expects a comm with windows: pass max_tokens and hidden_bytes "
                "to init_comm, " + ("got comm=None" if comm is None else f"got {comm}")
            )
        check_comm(comm, axis_name, 1)
        for name, array in (("tokens", tokens), ("gates", gates)):
            if array.dtype.name not in _DTYPES:
                return (
                    f"{name}: expected one of {', '.join(_DTYPES)} with transport 'peer', got "
                    f"{array.dtype.name}"
                )
        row_bytes = tokens.shape[1] * tokens.dtype.itemsize
        if row_bytes % 16:
            return (
                f"tokens: expected a hidden size of a multiple of 16 bytes with transport 'peer', "
                f"got {tokens.dtype.name} {list(tokens.shape)}"
            )
        n_tokens, top_k = gates.shape
        others = comm.size - 1
        needed = max(min(others * n_tokens, capacity), n_tokens * min(others, top_k))
        window = comm.window
        if needed > window.n_tokens or row_bytes > window.row_bytes or top_k > window.top_k:
            return (
                f"comm: its windows have room for {window.n_tokens} tokens of {window.row_bytes} "
                f"bytes and top_k up to {window.top_k}, and this call needs {needed} of "
                f"{row_bytes} bytes with top_k = {top_k}; raise max_tokens, hidden_bytes, top_k or "
                f"capacity_factor in init_comm"
            )
        return None

    def gathered(self, counts: jax.Array, axis_name: Any) -> jax.Array:
        """By the communicator, which takes as many counts at a time as it has experts."""
        assert self.comm is not None
        step = self.comm.max_experts
        parts = [
            sync_loads(counts[i : i + step], axis_name, comm=self.comm)
            for i in range(0, len(counts), step)
        ]
        return jnp.concatenate(parts, axis=1)

    def dispatch(
        self,
        tokens: jax.Array,
        gates: jax.Array,
        assignment: Assignment,
        counted: Counted,
        beside: Beside = ALONE,
    ) -> tuple[jax.Array, jax.Array, Any, Plan]:
        """The experts' copies travel meanwhile."""
        assert self.comm is not None
        routing = _routing(assignment, counted, self.comm)
        rows, row_gates, *came = _there(tokens, gates, routing)
        plan = PeerPlan(**vars(counted), routing=routing, came=tuple(came))
        experts = beside.experts
        if beside.waits:
            rows, experts = beside_rows(beside.fetch, rows, experts)
        return rows, row_gates, experts, plan


def _routing(assignment: Assignment, counted: Counted, comm: Comm) -> Routing:
    counts, groups = counted.counts, counted.order
    axis_name, capacity = counted.axis_name, counted.capacity
    me, n_ranks = lax.axis_index(axis_name), len(counts)
    rank, row = rows_of_choices(assignment, counts, groups, me, capacity)
    n_tokens = len(row)
    goes = jnp.where((row < 0) | (rank == me), n_ranks, rank)
    goes = (goes[..., None] == numbers(n_ranks)[None, None]).any(axis=1).astype(jnp.int32)
    before = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - goes
    first = is_first(rank, (row >= 0) & (rank != me))
    order = jnp.where(first, jnp.take_along_axis(before, rank, axis=1), -1)

    others = numbers(n_ranks)[:, None] != numbers(n_ranks)[None]
    rows = fitting(by_group(counts, groups), capacity).sum(axis=2, dtype=jnp.int32)
    room = jnp.where(others, jnp.minimum(rows, n_tokens), 0)  # from a source to a rank
    there, home = starts(room, axis=0), starts(room, axis=1)
    sizes = goes.sum(axis=0, dtype=jnp.int32)
    lists = jnp.stack([sizes, there[me], there[:, me], home[:, me], home[me]])
    n_received = min((n_ranks - 1) * n_tokens, capacity)
    return Routing(row, order, lists, capacity, n_received, axis_name, comm.identifier, comm.sms)


@jax.custom_vjp
def _there(
    tokens: jax.Array, gates: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return routing.call("lplb_there", reference.there, tokens, gates)


@jax.custom_vjp
def _back(rows: jax.Array, routing: Routing, came: tuple[jax.Array, jax.Array]) -> jax.Array:
    gates = varying_over(jnp.zeros(routing.capacity, jnp.float32), routing.axis_name)
    return routing.call("lplb_back", reference.back, rows, gates, *came)[0]


def _there_forward(tokens: jax.Array, gates: jax.Array, routing: Routing) -> Any:
    results = _there(tokens, gates, routing)
    return results, (routing, results[2:])


def _there_backward(saved: Any, cts: Any) -> tuple[jax.Array, jax.Array, None]:
    routing, came = saved
    tokens, gates = routing.call("lplb_back", reference.back, *cts[:2], *came)
    return tokens, gates, None


def _back_forward(rows: jax.Array, routing: Routing, came: Any) -> Any:
    return _back(rows, routing, came), routing


def _back_backward(routing: Routing, ct: jax.Array) -> tuple[jax.Array, None, None]:
    gates = varying_over(jnp.zeros(routing.row.shape, jnp.float32), routing.axis_name)
    return routing.call("lplb_there", reference.there, ct, gates)[0], None, None


_there.defvjp(_there_forward, _there_backward)
_back.defvjp(_back_forward, _back_backward)
