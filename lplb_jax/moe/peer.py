"""The transport "peer": the GPUs write tokens directly into one another's memory.

A token is written to the window of every rank that serves it, with the indices of the rows that it
expands to, and from the window to these rows; sums of rows return the same way. There is no send
buffer and no kernel in between, and a window holds as many tokens as its rank can receive,
whatever the number of ranks. Where windows cannot be mapped, a token is packed with all that
belongs to it, and NVSHMEM's put takes it to the window. `cuda/exchange.h` explains why no rank
overwrites data that another still reads.

The start of each list in a window, and every row, follow from the counts of all ranks. One kernel
exchanges the counts and computes all of it, `lplb_jax.reference.synced_plan` in a launch: for few
tokens, a dozen XLA kernels would take longer than the exchange. By put, the exchange of counts is
another launch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from lplb_jax import _native, reference
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm, check_comm
from lplb_jax.moe.flight import Flight, arrive, depart
from lplb_jax.moe.plan import Counted, Plan, Transport, planned
from lplb_jax.moe.transfers import ALONE, Beside, beside_rows

DTYPES = ("bfloat16", "float16", "float32", "float64")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["row", "order", "lists"],
    meta_fields=["capacity", "n_received", "n_sent", "axis_name", "comm", "sms", "row_bytes"],
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """The destinations of this rank's tokens; see `lplb_jax.reference.exchange`.

    Attributes:
      row, order: int32 `[tokens, top_k]`.
      lists: int32 `[5, ep_size]`.
      capacity: rows of a rank (static).
      n_received: tokens that a rank can receive from others (static).
      n_sent: tokens that a rank can send to others, once for each of them (static).
      axis_name: the expert-parallel mesh axis (static).
      comm: identifier of the communicator (static).
      sms: SMs that move tokens, 0 for all (static).
      row_bytes: bytes that the windows have for a token (static).
    """

    row: jax.Array
    order: jax.Array
    lists: jax.Array
    capacity: int
    n_received: int
    n_sent: int
    axis_name: Any
    comm: int
    sms: int
    row_bytes: int

    def call(
        self, target: str, specification: Any, rows: Any, gates: Any, *came: Any, **options: Any
    ) -> Any:
        """Calls the kernel `target`, or its specification if the backend has none.

        `rows` is an array, or a list of operands instead of it. For `options`, see `_native.call`.
        """
        rows = rows if isinstance(rows, list) else [rows]
        return _native.call(
            target,
            specification,
            *rows,
            gates,
            self.row,
            self.order,
            self.lists,
            lax.axis_index(self.axis_name),
            *came,
            axis_name=self.axis_name,
            capacity=self.capacity,
            n_received=self.n_received,
            n_sent=self.n_sent,
            comm=self.comm,
            sms=self.sms,
            **options,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["group_sizes", "slot_loads", "overflow", "routing"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Routed(Counted):
    """Counts of a batch, and its routing.

    Attributes:
      group_sizes, slot_loads, overflow, capacity, axis_name: see `Counted`.
      routing: where this rank's tokens go.
    """

    routing: Routing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["group_sizes", "slot_loads", "overflow", "routing", "came"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class PeerPlan(Plan):
    """The plan of tokens that ranks write into one another's memory.

    Attributes:
      group_sizes, slot_loads, overflow, capacity, axis_name: see `Plan`.
      routing: where this rank's tokens go.
      came: the rows of every received token, and the tokens received from every rank.
    """

    routing: Routing
    came: tuple[jax.Array, jax.Array]

    def summed(self, rows: jax.Array) -> jax.Array:
        """Sums all ranks' rows of this rank's tokens; sums travel as they are computed."""
        reason = _unfit("rows", rows)
        if reason is None and _bytes_of_a_row(rows) > self.routing.row_bytes:
            reason = (
                f"rows: expected at most {self.routing.row_bytes} bytes each, which the windows of "
                f"comm have room for, got {rows.dtype.name} {list(rows.shape)}; raise hidden_bytes "
                f"in init_comm, or pass another transport"
            )
        if reason is not None:
            raise ValueError(reason)
        return _back(rows, self.routing, self.came)

    def home(self, sums: jax.Array) -> jax.Array:
        """`summed` has already returned the sums."""
        return sums


@dataclasses.dataclass(frozen=True)
class Peer(Transport):
    """Moves tokens by kernels over the windows of a communicator, mapped or reached by put."""

    name = "peer"
    comm: Comm | None

    @property
    def beside_engines(self) -> bool:
        return self.comm is not None and self.comm.transport == "p2p"

    @property
    def comm_for_copies(self) -> Comm | None:
        return self.comm if self.comm is not None and self.comm.copy_bytes else None

    @property
    def windows(self) -> Comm | None:
        return self.comm

    def why_not(
        self, tokens: jax.Array, gates: jax.Array, axis_name: Any, capacity: int
    ) -> str | None:
        """Windows have limited room, and kernels support only some dtypes."""
        comm = self.comm
        if comm is None or comm.window is None:
            return (
                "transport: 'peer' expects a comm with windows: pass max_tokens and hidden_bytes "
                "to init_comm, " + ("got comm=None" if comm is None else f"got {comm}")
            )
        check_comm(comm, axis_name, 1)
        reason = _unfit("tokens", tokens) or _of_another_dtype("gates", gates)
        if reason is not None:
            return reason
        row_bytes = _bytes_of_a_row(tokens)
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

    def counted(
        self, assignment: Assignment, axis_name: Any, capacity: int, order: jax.Array | None = None
    ) -> Routed:
        """The kernel that makes the plan exchanges the counts."""
        assert self.comm is not None
        row, place, lists, *known = planned(assignment, axis_name, capacity, order, self.comm)
        others = self.comm.size - 1
        n_received = min(others * len(row), capacity)
        n_sent = len(row) * min(others, row.shape[1])
        assert self.comm.window is not None
        room = self.comm.window.row_bytes
        sizes = (capacity, n_received, n_sent)
        options = (axis_name, self.comm.identifier, self.comm.sms, room)
        routing = Routing(row, place, lists, *sizes, *options)
        return Routed(*known, capacity=capacity, axis_name=axis_name, routing=routing)

    def dispatch(
        self,
        tokens: jax.Array,
        gates: jax.Array,
        assignment: Assignment,
        counted: Routed,
        beside: Beside = ALONE,
    ) -> tuple[jax.Array, jax.Array, Any, Plan]:
        """Copies of experts travel at the same time."""
        del assignment
        experts, flight, number = beside.experts, None, None
        if isinstance(beside.fetch, Flight):
            flight = beside.fetch
            tokens, experts, number = depart(flight, tokens, experts)
        rows, row_gates, numbers, sizes = _there(tokens, gates, counted.routing)
        plan = PeerPlan(**counted.known, routing=counted.routing, came=(numbers, sizes))
        if flight is not None:
            rows, experts = arrive(flight, rows, experts, number)
        elif beside.waits:
            rows, experts = beside_rows(beside.fetch, rows, experts)
        return rows, row_gates, experts, plan


def _bytes_of_a_row(rows: jax.Array) -> int:
    return rows.shape[1] * rows.dtype.itemsize


def _of_another_dtype(name: str, array: jax.Array) -> str | None:
    if array.dtype.name in DTYPES:
        return None
    return (
        f"{name}: expected one of {', '.join(DTYPES)} with transport 'peer', got {array.dtype.name}"
    )


def _unfit(name: str, rows: jax.Array) -> str | None:
    """Why the kernels cannot move these rows, or None."""
    reason = _of_another_dtype(name, rows)
    if reason is not None or _bytes_of_a_row(rows) % 16 == 0:
        return reason
    return (
        f"{name}: expected a hidden size of a multiple of 16 bytes with transport 'peer', got "
        f"{rows.dtype.name} {list(rows.shape)}"
    )


@jax.custom_vjp
def _there(
    tokens: jax.Array, gates: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return routing.call("lplb_there", reference.there, tokens, gates)


@jax.custom_vjp
def _back(rows: jax.Array, routing: Routing, came: tuple[jax.Array, jax.Array]) -> jax.Array:
    gates = no_gates(len(rows)).reshape(0)
    return routing.call("lplb_back", reference.back, rows, gates, *came)[0]


def no_gates(n_rows: int) -> np.ndarray:
    """Float32 `[n_rows, 0]`."""
    return np.zeros((n_rows, 0), np.float32)


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
    return routing.call("lplb_there", reference.there, ct, no_gates(len(ct)))[0], None, None


_there.defvjp(_there_forward, _there_backward)
_back.defvjp(_back_forward, _back_backward)
