"""Fetches the copies of any placement through the windows of transport "peer".

Experts travel like tokens: cut into rows that fit in the windows, from their home to all ranks that
serve them, and the sums of their gradients back, by the kernels that move tokens. Arrays whose rows
are alike travel in one exchange. Only copies that serve tokens move, between processes as within
one, by NVSHMEM's put where windows cannot be mapped.

All ranks must make the same exchanges in the same order, so each waits for the one before, see
`transfers.one_by_one`. No rank receives an expert twice: of an expert's slots on a rank, only the
first serves tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native, _relays, reference
from lplb_jax.comm import Comm
from lplb_jax.moe.copies import add_received, numbers
from lplb_jax.moe.moves import rows_per_rank
from lplb_jax.moe.peer import DTYPES, Routing, no_gates
from lplb_jax.moe.slots import most_moved, room_for, without_room
from lplb_jax.placement import Placement
from lplb_jax.reference.journeys import Journeys

MOST_ARRAYS = 4  # in an exchange, see cuda/exchange.h
# A thread compares each copy with all before it.
MOST_COPIES, MOST_EXPERTS = 4096, 8192


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["journeys"],
    meta_fields=["n_local", "n_received", "axis_name", "comm", "sms", "row_bytes", "most_rows"],
)
@dataclasses.dataclass(frozen=True)
class WindowFetch:
    """Who sends which weights to whom, from their homes; see `AnyFetch`.

    Attributes:
      journeys: to and from this rank, see `lplb_jax.reference.journeys`.
      n_local: own experts of a rank (static).
      n_received: room for the gradients that come home (static).
      axis_name: the expert-parallel mesh axis (static).
      comm: identifier of the communicator (static).
      sms: SMs that move the copies, 0 for all (static).
      row_bytes: bytes that the windows have for a row (static).
      most_rows: of an expert, in one exchange (static).
    """

    journeys: Journeys
    n_local: int
    n_received: int
    axis_name: Any
    comm: int
    sms: int
    row_bytes: int
    most_rows: int

    @property
    def n_copies(self) -> int:
        """Room for copies on each rank."""
        return len(self.journeys.received)

    @property
    def by_engines(self) -> bool:
        """False: kernels move them."""
        return False

    def wanted(self, weights: jax.Array) -> jax.Array:
        """What others may fetch of this rank's weights: all of them, in place."""
        return weights

    def together(self, arrays: Sequence[jax.Array]) -> list[list[int]]:
        """Those that can be cut into the same rows, as many as the windows have room for.

        Windows serve one exchange after the other.
        """
        groups: list[list[int]] = []
        for i in range(len(arrays)):
            fits = (g for g in groups if self._alike([arrays[k] for k in (*g, i)]))
            group = next(fits, None)
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        return groups

    def _alike(self, arrays: list[jax.Array]) -> bool:
        """Whether these can travel together in rows at least half as long as those of each."""
        if len(arrays) > MOST_ARRAYS or len({array.dtype for array in arrays}) > 1:
            return False
        length = piece_length(arrays, self.row_bytes)
        longest = max(piece_length([array], self.row_bytes) or 0 for array in arrays)
        if length is None or 2 * length < longest:
            return False
        return sum(map(_size, arrays)) // length <= self.most_rows

    def delivered(self, wanted: Sequence[jax.Array]) -> list[jax.Array]:
        """All rows, with the copies that this rank receives; undefined in room without a copy."""
        weights, n, n_experts = self._cut(wanted)
        sent = self.journeys.sent
        filled = self._routing(n, n_experts).call(
            "lplb_weights_there", reference.weights_there, [*weights, sent],
            no_gates(len(sent) * n), arrays=len(weights), first_row=self.n_local * n,
            in_place=tuple((k, k) for k in range(len(weights))),
        )  # fmt: skip
        return [array.reshape(of.shape) for array, of in zip(filled, wanted, strict=False)]

    def write_into(self, weights: jax.Array, delivered: jax.Array) -> jax.Array:
        """What was delivered: windows fill the room in place."""
        del weights
        return delivered

    def sent_home(self, cts: Sequence[jax.Array]) -> list[jax.Array]:
        """Sends the copies' gradients home; returns their sums at the homes, of `journeys.sent`."""
        weights, n, n_experts = self._cut(cts)
        received, n_sent = self.journeys.received, len(self.journeys.sent)
        received = jnp.where(received < 0, -1, self.n_local + received)
        came = _pieces(received, n), self.journeys.sizes * n
        sums = self._routing(n, n_experts).call(
            "lplb_weights_back", reference.weights_back, weights, no_gates(0).reshape(0), *came,
            arrays=len(weights),
        )  # fmt: skip
        return [array.reshape(n_sent, *of.shape[1:]) for array, of in zip(sums, cts, strict=False)]

    def accumulate(self, ct: jax.Array, home: jax.Array) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        index = self.journeys.nth[: self.n_local]
        return without_room(add_received(ct, home, index[:, None]), self.n_local)

    def _cut(self, arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], int, int]:
        """`[experts, rows, length]`, where rows fit; the rows of an expert in all; and experts."""
        n_experts, length = len(arrays[0]), piece_length(arrays, self.row_bytes)
        assert length is not None, "checked by window_fetch"
        weights = [array.reshape(n_experts, -1, length) for array in arrays]
        return weights, sum(array.shape[1] for array in weights), n_experts

    def _routing(self, n: int, n_experts: int) -> Routing:
        """Of the experts that are sent, n rows each."""
        of_me = self.journeys
        there = of_me.rank * n_experts + self.n_local + of_me.copy
        row, order = (
            of_row.at[of_me.sent].get(mode="fill", fill_value=-1)
            for of_row in (jnp.where(of_me.rank < 0, -1, there), of_me.order)
        )
        return Routing(
            _pieces(row, n), _pieces(order, n), of_me.lists * n, capacity=n_experts * n,
            n_received=self.n_copies * n, n_sent=self.n_received * n, axis_name=self.axis_name,
            comm=self.comm, sms=self.sms, row_bytes=self.row_bytes,
        )  # fmt: skip


def window_fetch(
    placement: Placement,
    slots: jax.Array,
    axis_name: Any,
    experts: Any,
    comm: Comm,
    *,
    slot_loads: jax.Array,
    fan_out: int | None,
    n_nodes: int | None,
    relays: bool,
) -> WindowFetch | None:
    """Fetches the copies with tokens in `slots_by_row(placement)` through the windows of `comm`.

    None if these have no room. With `relays`, None where ranks should relay hot experts, see
    `fetch_anywhere`, which explains the other arguments.
    """
    window, n_ranks = comm.window, placement.ep_size
    n_local, room = rows_per_rank(placement), room_for(placement)
    most, of_rank = most_moved(placement, fan_out, of_used=True)
    most = max(1, most)  # of a single rank, too
    limits = _relays.limits(n_ranks, n_nodes or placement.n_nodes, most)
    if window is None or most > window.top_k or (relays and limits.rounds > 1):
        return None
    n_received = min(of_rank, n_local * most)
    most_rows = min(
        window.n_tokens // max(room, n_received, 1), (2**31 - 1) // (n_ranks * (n_local + room))
    )
    for leaf in jax.tree.leaves(experts):
        length = piece_length([leaf], window.row_bytes)
        if length is None or leaf.dtype.name not in DTYPES or _size(leaf) // length > most_rows:
            return None
    operands = jnp.asarray(placement.phy2log), slots, slot_loads, lax.axis_index(axis_name)
    sizes: dict[str, Any] = {"n_logical": placement.n_logical, "most": most}
    sizes["n_received"] = n_received
    if n_ranks * room <= MOST_COPIES and placement.n_logical <= MOST_EXPERTS:
        journeys = _native.call("lplb_journeys", reference.journeys, *operands, **sizes)
    else:
        journeys = reference.journeys(*operands, **sizes)
    return WindowFetch(
        Journeys(*journeys), n_local, n_received, axis_name, comm.identifier, comm.sms,
        window.row_bytes, most_rows,
    )  # fmt: skip


def piece_length(arrays: Sequence[jax.Array], row_bytes: int) -> int | None:
    """The most elements per row of an expert: a divisor in all arrays, a multiple of 16 bytes."""
    length, size = math.gcd(*map(_size, arrays)), arrays[0].dtype.itemsize
    fits = (n for n in range(min(length, row_bytes // size), 0, -1) if length % n == 0)
    return next((n for n in fits if n * size % 16 == 0), None)


def _size(array: jax.Array) -> int:
    """Elements of an expert."""
    return math.prod(array.shape[1:])


def _pieces(experts: jax.Array, n: int) -> jax.Array:
    """For each of an expert's n rows, its number; −1 stays."""
    of_rows = experts[:, None] * n + numbers(n)[None, :, None]
    return jnp.where(experts[:, None] < 0, -1, of_rows).reshape(-1, experts.shape[1])
