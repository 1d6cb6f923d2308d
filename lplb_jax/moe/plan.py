"""How tokens travel: what every transport does, and what it knows of a batch.

A transport is a class. It is asked whether it can carry a batch (`why_not`), it gathers the counts
of all ranks, from which every row follows, and it sends the tokens. What comes back from that is a
`Plan`, which brings the results home. Derivatives are made of the same parts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._axes import varying_as
from lplb_jax.assignment import Assignment
from lplb_jax.loads import sync_loads
from lplb_jax.moe.copies import numbers
from lplb_jax.moe.transfers import ALONE, Beside


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "order"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Counted:
    """What all ranks know of a batch before any token has travelled.

    Attributes:
      counts: int32 `[ep_size, ep_size, slots_per_rank]`: rows from a source for a rank's slot.
      order: int32 `[ep_size, groups]`: the slot whose rows each group of a rank has, slots_per_rank
        for none; None for all slots one after the other.
      capacity: rows that a rank has room for (static).
      axis_name: the expert-parallel mesh axis (static).
    """

    counts: jax.Array
    order: jax.Array | None
    capacity: int
    axis_name: Any

    @property
    def slot_loads(self) -> jax.Array:
        """Rows for every slot from all sources, those without room included: `[n_physical]`."""
        return self.counts.sum(axis=0, dtype=jnp.int32).reshape(-1)

    @property
    def overflow(self) -> jax.Array:
        """Rows of all ranks that found no room: int32 scalar."""
        received = self.counts.sum(axis=(0, 2), dtype=jnp.int32)
        return jnp.maximum(received - self.capacity, 0).sum(dtype=jnp.int32)

    @property
    def group_sizes(self) -> jax.Array:
        """Rows that this rank received for each of its groups, those of its slots: int32."""
        me = lax.axis_index(self.axis_name)
        counts = by_group(self.counts, self.order)
        return fitting(counts, self.capacity)[:, me].sum(axis=0, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Plan(Counted, abc.ABC):
    """Where the tokens of one batch went, and come back from. `combine` takes it.

    Attributes:
      counts: int32 `[ep_size, ep_size, slots_per_rank]`: rows from a source for a rank's slot.
      order: int32 `[ep_size, groups]`: the slot whose rows each group of a rank has, slots_per_rank
        for none; None for all slots one after the other.
      capacity: rows that a rank has room for (static).
      axis_name: the expert-parallel mesh axis (static).
    """

    @abc.abstractmethod
    def summed(self, rows: jax.Array) -> jax.Array:
        """The sums of this rank's rows, token by token, where `home` expects them."""

    @abc.abstractmethod
    def home(self, sums: jax.Array) -> jax.Array:
        """Those sums, on their tokens' ranks and added up there: `[tokens, …]`."""


class Transport(abc.ABC):
    """A way for tokens to the ranks of their slots and back.

    Attributes:
      name: what users call it.
    """

    name: ClassVar[str]

    @property
    def beside_engines(self) -> bool:
        """Whether copy engines fetch weights along a topology beside it, as within a process."""
        return False

    @abc.abstractmethod
    def why_not(
        self, tokens: jax.Array, gates: jax.Array, axis_name: Any, capacity: int
    ) -> str | None:
        """Why it cannot carry these to rows of such capacity, or None where it can."""

    def gathered(self, counts: jax.Array, axis_name: Any) -> jax.Array:
        """Everybody's counts: int32 `[n_physical]` -> `[ep_size, n_physical]`."""
        return sync_loads(counts, axis_name)

    def counted(
        self, assignment: Assignment, axis_name: Any, capacity: int, order: jax.Array | None = None
    ) -> Counted:
        """What follows from the counts of all ranks; `order` as in `Counted`."""
        n_ranks = lax.axis_size(axis_name)
        counts = self.gathered(assignment.counts, axis_name)
        return Counted(counts.reshape(n_ranks, n_ranks, -1), order, capacity, axis_name)

    @abc.abstractmethod
    def dispatch(
        self,
        tokens: jax.Array,
        gates: jax.Array,
        assignment: Assignment,
        counted: Counted,
        beside: Beside = ALONE,
    ) -> tuple[jax.Array, jax.Array, Any, Plan]:
        """The rows of this rank's groups, `[capacity, hidden]`, the gate of each, the experts with
        the copies that came beside them, and the way back."""


def rows_of_choices(
    assignment: Assignment,
    counts: jax.Array,
    order: jax.Array | None,
    me: jax.Array,
    capacity: int,
) -> tuple[jax.Array, jax.Array]:
    """The rank that serves every choice of this source, and the choice's row there.

    Rows are numbered over all ranks, `capacity` on each; −1 where there is none. Both of the shape
    of the assignment.
    """
    slot = jnp.maximum(assignment.physical_indices, 0)
    rank = slot // counts.shape[2]
    grouped = by_group(counts, order)
    n_fitting, first = (
        _by_slot(of_groups[me], order, counts.shape[2]).reshape(-1)[slot]
        for of_groups in (fitting(grouped, capacity), _row_starts(grouped))
    )
    arrives = (assignment.physical_indices >= 0) & (assignment.position < n_fitting)
    return rank, jnp.where(arrives, rank * capacity + first + assignment.position, -1)


def is_first(rank: jax.Array, arrives: jax.Array) -> jax.Array:
    """Whether a choice is its token's first that arrives on its rank: it has the token's place."""
    top_k = rank.shape[1]
    same = arrives[:, None] & (rank[:, None] == rank[..., None])  # [tokens, top_k, top_k]
    return arrives & ~(same & jnp.tril(jnp.ones((1, top_k, top_k), bool), -1)).any(axis=2)


def fitting(counts: jax.Array, capacity: int) -> jax.Array:
    """The counts without the rows that find no room: those that come last."""
    return jnp.clip(capacity - _row_starts(counts), 0, counts)


def by_group(counts: jax.Array, order: jax.Array | None) -> jax.Array:
    """From the order of a rank's slots, which are the last axis, to that of its groups."""
    if order is None:
        return counts
    rank = numbers(len(order))[:, None]
    return counts.at[:, rank, order].get(mode="fill", fill_value=0)


def _by_slot(of_groups: jax.Array, order: jax.Array | None, n_slots: int) -> jax.Array:
    """`[ep_size, groups]` -> `[ep_size, n_slots]`; 0 for slots without a group."""
    if order is None:
        return of_groups
    empty = varying_as(jnp.zeros((len(order), n_slots), of_groups.dtype), of_groups)
    return empty.at[numbers(len(order))[:, None], order].set(of_groups, mode="drop")


def _row_starts(counts: jax.Array) -> jax.Array:
    """Where rows start on their rank, slot by slot and source by source: of `counts`' shape."""
    rows = counts.transpose(1, 2, 0)
    return starts(rows.reshape(len(counts), -1), axis=1).reshape(rows.shape).transpose(2, 0, 1)


def starts(sizes: jax.Array, axis: int) -> jax.Array:
    """Where each begins if they stand one after the other along `axis`."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes
