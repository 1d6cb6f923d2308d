"""Moves tokens by one of XLA's collectives: one list from every rank to every other.

A source knows the counts of all ranks and, from `Assignment.position`, the row of each of its
choices, so it sends row numbers along with the tokens. The exchanges there and back are each
other's transposes, as are copying and summing; derivatives consist of the same parts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax.assignment import Assignment
from lplb_jax.loads import sync_loads
from lplb_jax.moe import transfers
from lplb_jax.moe.copies import Copies, add, choice_at, copy, custom_vjp, numbers
from lplb_jax.moe.plan import Counted, Plan, Transport, planned
from lplb_jax.reference.plan import list_order


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes"],
    meta_fields=["n_sent", "n_received", "axis_name", "transport"],
)
@dataclasses.dataclass(frozen=True)
class SendLists:
    """Lists of tokens, one from every rank to every other.

    Attributes:
      sizes: int32 `[ep_size, ep_size]`: tokens from a source to a rank.
      n_sent: tokens a source has room to send, rank by rank (static).
      n_received: tokens a rank has room to receive, source by source (static).
      axis_name: the expert-parallel mesh axis (static).
      transport: moves the lists and defines where they start (static).
    """

    sizes: jax.Array
    n_sent: int
    n_received: int
    axis_name: Any
    transport: Collective


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["group_sizes", "slot_loads", "overflow", "row"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Numbered(Counted):
    """Counts of a batch, and the row of every choice.

    Attributes:
      group_sizes, slot_loads, overflow, capacity, axis_name: see `Counted`.
      row: int32 `[tokens, top_k]`, rank · capacity + row of this source's choices; −1 for none.
    """

    row: jax.Array


class Collective(Transport):
    """A transport that moves any arrays, including weights.

    Attributes:
      exact: whether only existing tokens travel; otherwise every pair of ranks has equal room.
    """

    exact: ClassVar[bool]

    @abc.abstractmethod
    def why_not_here(self) -> str | None:
        """The reason why it cannot run, between processes if there are several; or None."""

    @abc.abstractmethod
    def rooms(self, n_tokens: int, top_k: int, n_ranks: int, capacity: int) -> tuple[int, int]:
        """`n_sent` and `n_received` of `SendLists`."""

    @abc.abstractmethod
    def starts_sent(self, lists: SendLists) -> jax.Array:
        """Where each list starts in its source's send buffer; shaped like `lists.sizes`."""

    @abc.abstractmethod
    def arrived(self, lists: SendLists, rank: Any) -> jax.Array:
        """bool `[n_received]`: which entries of the receive buffer hold tokens."""

    @abc.abstractmethod
    def moved(self, array: jax.Array, lists: SendLists, way: str) -> jax.Array:
        """`exchange` without its derivative."""

    def why_not(
        self, tokens: jax.Array, gates: jax.Array, axis_name: Any, capacity: int
    ) -> str | None:
        """Any batch will do."""
        del tokens, gates, capacity, axis_name
        return self.why_not_here()

    def counted(
        self, assignment: Assignment, axis_name: Any, capacity: int, order: jax.Array | None = None
    ) -> Numbered:
        """All-gathers the counts."""
        row, _, _, *known = planned(assignment, axis_name, capacity, order)
        return Numbered(*known, capacity=capacity, axis_name=axis_name, row=row)

    def dispatch(
        self,
        tokens: jax.Array,
        gates: jax.Array,
        assignment: Assignment,
        counted: Numbered,
        beside: transfers.Beside = transfers.ALONE,
    ) -> tuple[jax.Array, jax.Array, Any, Plan]:
        """Copies of experts travel while received tokens are expanded to rows, see `transfers`."""
        del assignment
        plan = _planned(self, counted)
        experts = beside.experts
        if beside.waits:
            sent, experts = transfers.send_tokens(beside.fetch, tokens, plan.sent, experts)
        else:
            sent = copy(tokens, plan.sent)
        received = exchange(sent, plan.lists, "there")
        if beside.follows:
            received, experts = transfers.after(received, experts)
        row_gates = exchange(copy(gates, plan.sent), plan.lists, "there").reshape(-1)
        rows, row_gates, experts = transfers.expand_rows(
            beside.fetch, received, row_gates, plan.received, experts
        )
        return rows, copy(row_gates, plan.choices), experts, plan


@dataclasses.dataclass(frozen=True)
class Padded(Collective):
    """`lax.all_to_all`: lists of equal room, on all backends."""

    name = "padded"
    exact = False

    def why_not_here(self) -> str | None:
        """It runs everywhere."""

    def rooms(self, n_tokens: int, top_k: int, n_ranks: int, capacity: int) -> tuple[int, int]:
        """Room for the most tokens that a source can have for a rank, for every rank."""
        del top_k
        room = n_ranks * min(n_tokens, capacity)
        return room, room

    def starts_sent(self, lists: SendLists) -> jax.Array:
        """Lists start at equal distances."""
        n_ranks = len(lists.sizes)
        room = lists.n_sent // n_ranks
        return jnp.broadcast_to(room * numbers(n_ranks)[None], lists.sizes.shape)

    def arrived(self, lists: SendLists, rank: Any) -> jax.Array:
        """Tokens come first in every list."""
        sizes = lists.sizes[:, rank]
        room = lists.n_received // len(sizes)
        return (numbers(room)[None] < sizes[:, None]).reshape(-1)

    def moved(self, array: jax.Array, lists: SendLists, way: str) -> jax.Array:
        """The same in both directions."""
        del way
        return lax.all_to_all(array, lists.axis_name, 0, 0, tiled=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "group_sizes",
        "slot_loads",
        "overflow",
        "lists",
        "sent",
        "row_of",
        "choice_of",
    ],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class ListPlan(Plan):
    """The plan of tokens that travel in lists.

    Attributes:
      group_sizes, slot_loads, overflow, capacity, axis_name: see `Plan`.
      lists: what goes from rank to rank.
      sent: the tokens' places in this rank's send buffer.
      row_of: int32 `[n_received, top_k]`, the row of every choice of the received tokens; capacity
        for choices that other ranks serve, and for none.
      choice_of: int32 `[capacity]`, the choice that a row serves, numbered token by token;
        undefined past the last row.
    """

    lists: SendLists
    sent: Copies
    row_of: jax.Array
    choice_of: jax.Array

    @property
    def received(self) -> Copies:
        """The rows of the tokens that this rank receives."""
        return Copies(self.choice_of // self.row_of.shape[1], self.row_of)

    @property
    def choices(self) -> Copies:
        """The rows of these tokens' choices, at most one each."""
        return Copies(self.choice_of, self.row_of.reshape(-1, 1))

    def summed(self, rows: jax.Array) -> jax.Array:
        """Sums this rank's rows per received token."""
        return add(rows, self.received)

    def home(self, sums: jax.Array) -> jax.Array:
        """Returns these sums to the tokens' ranks and adds them up there."""
        return add(exchange(sums, self.lists, "back"), self.sent)


def _planned(transport: Collective, counted: Numbered) -> ListPlan:
    """Exchanges the tokens' counts and row numbers."""
    axis_name, capacity, row = counted.axis_name, counted.capacity, counted.row
    me, n_ranks = lax.axis_index(axis_name), lax.axis_size(axis_name)
    rank = jnp.maximum(row, 0) // capacity

    sizes, order = list_order(rank, row >= 0, n_ranks)
    sizes = sync_loads(sizes, axis_name)
    n_tokens, top_k = row.shape
    n_sent, n_received = transport.rooms(n_tokens, top_k, n_ranks, capacity)
    lists = SendLists(sizes, n_sent, n_received, axis_name, transport)
    place = jnp.where(order < 0, n_sent, transport.starts_sent(lists)[me][rank] + order)
    sent = Copies(choice_at(place, n_sent) // top_k, place)

    # A rank serves those choices of a received token whose rows are its own.
    row = exchange(copy(row, sent), lists, "there") - me * capacity
    here = transport.arrived(lists, me)[:, None] & (row >= 0) & (row < capacity)
    row = jnp.where(here, row, capacity)
    return ListPlan(
        **counted.known, lists=lists, sent=sent, row_of=row, choice_of=choice_at(row, capacity)
    )


@custom_vjp(2)
def exchange(array: jax.Array, lists: SendLists, way: str) -> jax.Array:
    """Moves `[n_sent, …]` of sources to `[n_received, …]` of ranks ("there"), or "back".

    Entries without a token are undefined.
    """
    return lists.transport.moved(array, lists, way)


def _exchange_forward(array: jax.Array, lists: SendLists, way: str) -> tuple[jax.Array, SendLists]:
    return exchange(array, lists, way), lists


def _exchange_backward(way: str, lists: SendLists, ct: jax.Array) -> tuple[jax.Array, None]:
    return exchange(ct, lists, "back" if way == "there" else "there"), None


exchange.defvjp(_exchange_forward, _exchange_backward)
