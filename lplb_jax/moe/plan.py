"""How tokens travel: what every transport does, and what it knows of a batch.

A transport is a class. It is asked whether it can carry a batch (`why_not`), it shares the counts
of all ranks, from which every row follows (`counted`), and it sends the tokens. What comes back
from that is a `Plan`, which brings the results home. Derivatives are made of the same parts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplb_jax import _native, reference
from lplb_jax.assignment import Assignment
from lplb_jax.comm import Comm
from lplb_jax.loads import sync_loads
from lplb_jax.moe.transfers import ALONE, Beside


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["group_sizes", "slot_loads", "overflow"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Counted:
    """What follows from the counts of all ranks, before any token has travelled.

    Attributes:
      group_sizes: int32 `[groups]`, rows that this rank receives for each of its groups, those of
        its slots.
      slot_loads: int32 `[n_physical]`, rows for every slot from all sources, those without room
        included.
      overflow: int32 scalar, rows of all ranks that found no room.
      capacity: rows that a rank has room for (static).
      axis_name: the expert-parallel mesh axis (static).
    """

    group_sizes: jax.Array
    slot_loads: jax.Array
    overflow: jax.Array
    capacity: int
    axis_name: Any

    @property
    def known(self) -> dict[str, Any]:
        """These attributes, without those that a subclass adds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Counted)}


@dataclasses.dataclass(frozen=True)
class Plan(Counted, abc.ABC):
    """Where the tokens of one batch went, and come back from. `combine` takes it.

    Attributes:
      group_sizes: int32 `[groups]`, rows that this rank received for each of its slots, or groups.
      slot_loads: int32 `[n_physical]`, rows for every slot from all sources, those without room
        included.
      overflow: int32 scalar, rows of all ranks that found no room.
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

    @abc.abstractmethod
    def counted(
        self, assignment: Assignment, axis_name: Any, capacity: int, order: jax.Array | None = None
    ) -> Any:
        """A `Counted`, and what `dispatch` has to know besides.

        `order` is int32 `[ep_size, groups]`: the slot whose rows each group of a rank has,
        slots_per_rank for none; None for all slots one after the other.
        """

    @abc.abstractmethod
    def dispatch(
        self,
        tokens: jax.Array,
        gates: jax.Array,
        assignment: Assignment,
        counted: Any,
        beside: Beside = ALONE,
    ) -> tuple[jax.Array, jax.Array, Any, Plan]:
        """The rows of this rank's groups, `[capacity, hidden]`, the gate of each, the experts with
        the copies that came beside them, and the way back."""


def planned(
    assignment: Assignment,
    axis_name: Any,
    capacity: int,
    order: jax.Array | np.ndarray | None,
    comm: Comm | None = None,
) -> Sequence[jax.Array]:
    """`reference.plan` of everybody's counts, which the kernel exchanges where there is `comm`."""
    n_ranks, n_physical = lax.axis_size(axis_name), len(assignment.counts)
    if order is None:
        slots = np.arange(n_physical // n_ranks, dtype=np.int32)
        order = np.broadcast_to(slots, (n_ranks, len(slots)))
    me, room = lax.axis_index(axis_name), workspace(assignment.position.size, n_ranks)
    fits = _fits(n_ranks, n_physical // n_ranks)
    if comm is not None and n_physical <= comm.most_slots and fits:
        options = {"axis_name": axis_name, "capacity": capacity, "comm": comm.identifier}
        return _native.call(
            "lplb_synced_plan",
            reference.synced_plan,
            *assignment,
            order,
            me,
            workspace=room,
            **options,
        )
    slot, position, counts = assignment
    counts = sync_loads(counts, axis_name).reshape(n_ranks, n_ranks, -1)
    operands = (slot, position, counts, order, me)
    if not fits:
        return reference.plan(*map(jnp.asarray, operands), capacity=capacity)
    return _native.call("lplb_plan", reference.plan, *operands, workspace=room, capacity=capacity)


def _fits(n_ranks: int, n_slots: int) -> bool:
    """Whether the kernel has the shared memory for the counts of so many ranks.

    True where there is no GPU to ask: then native code says what it needs when the program runs.
    """
    extension = _native.cuda()
    if extension is None or jax.default_backend() != "gpu":
        return True
    return extension.plan_bytes(n_ranks, n_slots) <= extension.current_device().shared_bytes


def workspace(n_choices: int, n_ranks: int) -> tuple[int, int]:
    """Of the kernels that plan: parts of a batch, which a block each plans.

    What comes before a part is counted first. That takes a kernel of its own, which pays from the
    second part on.
    """
    return min(max(n_choices // 4096, 1), 64), n_ranks
