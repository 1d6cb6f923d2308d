"""Fetches the copies of any placement through the windows of transport "peer".

Experts travel like tokens: cut into rows that fit in the windows, from their home to all ranks that
serve them, and the sums of their gradients back, by the kernels that move tokens. Only copies that
serve tokens move, between processes as within one, by NVSHMEM's put where windows cannot be mapped.

All ranks must make the same exchanges in the same order, so each waits for the one before, see
`transfers.one_by_one`. No rank receives an expert twice: of an expert's slots on a rank, only the
first serves tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import reference
from lplb_jax._axes import varying_as
from lplb_jax.comm import Comm
from lplb_jax.moe.copies import add_received, numbers
from lplb_jax.moe.peer import DTYPES, Routing, no_gates
from lplb_jax.moe.slots import FetchAnywhere


class _Journeys(NamedTuple):
    """Of one rank, int32, in experts; −1 for none.

    Attributes:
      rank, copy, order: `[n_rows, most]`, where a row is sent, as which of the copies there, and
        its place among those sent there.
      sent: `[n_sent]`, the rows that are sent anywhere; n_rows past the last.
      nth: `[n_rows]`, the inverse; n_sent for rows that are not sent.
      received: `[room, most]`, the copies received, by place in the window; at the index among the
        copies of their expert.
      lists: `[5, ep_size]`, see `lplb_jax.reference.exchange`.
      sizes: `[ep_size]`, copies received from every rank.
    """

    rank: jax.Array
    copy: jax.Array
    order: jax.Array
    sent: jax.Array
    nth: jax.Array
    received: jax.Array
    lists: jax.Array
    sizes: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["round", "peer", "row", "child", "place"],
    meta_fields=[
        "n_local", "limits", "n_received", "axis_name", "transport", "comm", "sms", "row_bytes",
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class WindowFetch(FetchAnywhere):
    """Who sends which weights to whom, in one round from their homes; see `FetchAnywhere`.

    Attributes:
      comm: identifier of the communicator (static).
      sms: SMs that move the copies, 0 for all (static).
      row_bytes: bytes that the windows have for a row (static).
    """

    comm: int
    sms: int
    row_bytes: int

    @property
    def in_order(self) -> bool:
        """True: windows serve one exchange after the other."""
        return True

    def delivered(self, wanted: jax.Array) -> jax.Array:
        """The copies that this rank receives, `[room, …]`; undefined where there is none."""
        rows, n = self._cut(wanted)
        of_me = self._journeys(len(wanted))
        there = of_me.rank * self.n_copies + of_me.copy
        row = _pieces(jnp.where(of_me.rank < 0, -1, there), n)
        routing = self._routing(row, _pieces(of_me.order, n), of_me, n, self.n_copies * n)
        copies, *_ = routing.call("lplb_there", reference.there, rows, no_gates(rows))
        return copies.reshape(self.n_copies, *wanted.shape[1:])

    def sent_home(self, ct: jax.Array) -> jax.Array:
        """Sends the copies' gradients home; returns their sums, `[n_sent, …]`, at the homes."""
        rows, n = self._cut(ct)
        of_me = self._journeys(len(ct))
        there = of_me.rank * len(ct) + self.n_local + of_me.copy
        row, order = (
            of_row.at[of_me.sent].get(mode="fill", fill_value=-1)
            for of_row in (jnp.where(of_me.rank < 0, -1, there), of_me.order)
        )
        routing = self._routing(_pieces(row, n), _pieces(order, n), of_me, n, len(rows))
        received = jnp.where(of_me.received < 0, -1, self.n_local + of_me.received)
        came = _pieces(received, n), of_me.sizes * n
        sums, _ = routing.call("lplb_back", reference.back, rows, no_gates(rows).reshape(0), *came)
        return sums.reshape(len(of_me.sent), *ct.shape[1:])

    def accumulate(self, ct: jax.Array, home: jax.Array) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        index = self._journeys(len(ct)).nth[: self.n_local]
        return self.without_room(add_received(ct, home, index[:, None]))

    def _cut(self, array: jax.Array) -> tuple[jax.Array, int]:
        """The array's experts as rows that fit, and how many rows an expert has."""
        length = piece_length(array, self.row_bytes)
        assert length is not None, "checked by window_fetch"
        rows = array.reshape(-1, length)
        return rows, len(rows) // len(array)

    def _routing(
        self, row: jax.Array, order: jax.Array, of_me: _Journeys, n: int, capacity: int
    ) -> Routing:
        return Routing(
            row, order, of_me.lists * n, capacity=capacity, n_received=self.n_copies * n,
            n_sent=self.n_received * n, axis_name=self.axis_name, comm=self.comm, sms=self.sms,
            row_bytes=self.row_bytes,
        )  # fmt: skip

    def _journeys(self, n_rows: int) -> _Journeys:
        """The journeys to and from this rank, whose arrays have n_rows rows."""
        me, n_ranks = lax.axis_index(self.axis_name), len(self.peer)
        moves, ranks, copies = self.round == 0, numbers(n_ranks), numbers(self.n_copies)
        most = self.limits.sent
        sent = moves[..., None] & (self.peer[..., None] == ranks[None, None])
        sizes = sent.sum(axis=1, dtype=jnp.int32)  # [to, from]
        # In the order of the sender's rows.
        ahead = moves[:, None] & (self.peer[:, None] == self.peer[..., None])
        ahead &= self.row[:, None] < self.row[..., None]
        order = ahead.sum(axis=2, dtype=jnp.int32)

        at = jnp.where(moves & (self.peer == me), self.row * most + self.child, n_rows * most)

        def of_rows(values: jax.Array) -> jax.Array:
            empty = varying_as(jnp.full(n_rows * most, -1, jnp.int32), at)
            values = jnp.broadcast_to(values, at.shape)
            return empty.at[at].set(values, mode="drop").reshape(n_rows, most)

        rank = of_rows(ranks[:, None])
        is_sent = (rank >= 0).any(axis=1)
        n_sent = min(self.n_local, self.n_received)
        index = jnp.where(is_sent, jnp.cumsum(is_sent, dtype=jnp.int32) - 1, n_sent)
        rows = varying_as(jnp.full(n_sent, n_rows, jnp.int32), index)
        rows = rows.at[index].set(numbers(n_rows), mode="drop")

        before = _before(sizes[me])
        place = jnp.where(moves[me], before[self.peer[me]] + order[me], self.n_copies)
        received = varying_as(jnp.full((self.n_copies, most), -1, jnp.int32), place)
        received = received.at[place, self.child[me]].set(copies, mode="drop")
        lists = [
            sizes[:, me],
            jnp.where(ranks[None] < me, sizes, 0).sum(axis=1, dtype=jnp.int32),
            before,
            jnp.where(ranks[:, None] < me, sizes, 0).sum(axis=0, dtype=jnp.int32),
            _before(sizes[:, me]),
        ]
        of_sent = rank, of_rows(copies), of_rows(order), rows, index
        return _Journeys(*of_sent, received, jnp.stack(lists), sizes[me])


def window_fetch(fetch: FetchAnywhere, experts: Any, comm: Comm) -> WindowFetch | None:
    """The same fetch through the windows of `comm`; None if they have no room or ranks relay."""
    window, n_ranks, limits = comm.window, len(fetch.peer), fetch.limits
    if window is None or limits.rounds > 1 or limits.sent > window.top_k:
        return None
    for leaf in jax.tree.leaves(experts):
        length = piece_length(leaf, window.row_bytes)
        if length is None or leaf.dtype.name not in DTYPES:
            return None
        n = math.prod(leaf.shape[1:]) // length
        needed = max(fetch.n_copies, fetch.n_received) * n
        if needed > window.n_tokens or n_ranks * (fetch.n_local + fetch.n_copies) * n >= 2**31:
            return None
    fields = {field.name: getattr(fetch, field.name) for field in dataclasses.fields(fetch)}
    return WindowFetch(**fields, comm=comm.identifier, sms=comm.sms, row_bytes=window.row_bytes)


def piece_length(array: jax.Array, row_bytes: int) -> int | None:
    """The most elements of an expert per row: a divisor of all, and a multiple of 16 bytes."""
    length, size = math.prod(array.shape[1:]), array.dtype.itemsize
    fits = (n for n in range(min(length, row_bytes // size), 0, -1) if length % n == 0)
    return next((n for n in fits if n * size % 16 == 0), None)


def _pieces(experts: jax.Array, n: int) -> jax.Array:
    """For each of an expert's n rows, its number; −1 stays."""
    of_rows = experts[:, None] * n + numbers(n)[None, :, None]
    return jnp.where(experts[:, None] < 0, -1, of_rows).reshape(-1, experts.shape[1])


def _before(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes
