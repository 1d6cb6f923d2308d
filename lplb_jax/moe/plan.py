"""How tokens travel: the interface of transports, and their plans of a batch.

A transport is a class. It tells whether it can carry a batch (`why_not`), exchanges the counts of
all ranks, which determine every row (`counted`), and sends the tokens (`dispatch`). The latter
returns a `Plan`, which brings the results home. Derivatives consist of the same parts.
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
from lplb_jax.loads import all_gather_counts
from lplb_jax.moe.transfers import ALONE, Beside


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["group_sizes", "slot_loads", "overflow"],
    meta_fields=["capacity", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Counted:
    """What follows from the counts of all ranks, before any token travels.

    Attributes:
      group_sizes: int32 `[groups]`, rows that this rank receives for each of its slots, or groups.
      slot_loads: int32 `[n_physical]`, rows for every slot from all sources, including rows without
        room.
      overflow: int32 scalar, rows of all ranks that do not fit.
      capacity: rows that fit on a rank (static).
      axis_name: the expert-parallel mesh axis (static).
    """

    group_sizes: jax.Array
    slot_loads: jax.Array
    overflow: jax.Array
    capacity: int
    axis_name: Any

    @property
    def known(self) -> dict[str, Any]:
        """The attributes above, without those of a subclass."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Counted)}


@dataclasses.dataclass(frozen=True)
class Plan(Counted, abc.ABC):
    """Where the tokens of one batch went, and how they return. An argument of `combine`.

    Attributes:
      group_sizes: int32 `[groups]`, rows that this rank received for each of its slots, or groups.
      slot_loads: int32 `[n_physical]`, rows for every slot from all sources, including rows without
        room.
      overflow: int32 scalar, rows of all ranks that did not fit.
      capacity: rows that fit on a rank (static).
      axis_name: the expert-parallel mesh axis (static).
    """

    @abc.abstractmethod
    def summed(self, rows: jax.Array) -> jax.Array:
        """Sums this rank's rows token by token, in the layout that `home` expects."""

    @abc.abstractmethod
    def home(self, sums: jax.Array) -> jax.Array:
        """Returns these sums to their tokens' ranks and adds them up there: `[tokens, …]`."""


class Transport(abc.ABC):
    """Moves tokens to the ranks of their slots and back.

    Attributes:
      name: the value of the argument `transport`.
    """

    name: ClassVar[str]

    @property
    def beside_engines(self) -> bool:
        """Whether copy engines can fetch weights along a topology meanwhile, as in one process."""
        return False

    @property
    def comm_for_copies(self) -> Comm | None:
        """The communicator whose memory takes copies along a topology meanwhile, or None."""
        return None

    @property
    def windows(self) -> Comm | None:
        """The communicator whose windows can also take copies of experts, or None."""
        return None

    @abc.abstractmethod
    def why_not(
        self, tokens: jax.Array, gates: jax.Array, axis_name: Any, capacity: int
    ) -> str | None:
        """The reason why it cannot carry this batch at this capacity, or None."""

    @abc.abstractmethod
    def counted(
        self, assignment: Assignment, axis_name: Any, capacity: int, order: jax.Array | None = None
    ) -> Any:
        """Exchanges the counts; a subclass adds to `Counted` what its `dispatch` needs.

        `order` is int32 `[ep_size, groups]`: the slot of each group of a rank, slots_per_rank for
        none; None for all slots in order.
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
        """Returns the rows of this rank's groups, `[capacity, hidden]`, their gates, the experts
        with the copies fetched meanwhile, and the plan for the way back."""


def planned(
    assignment: Assignment,
    axis_name: Any,
    capacity: int,
    order: jax.Array | np.ndarray | None,
    comm: Comm | None = None,
) -> Sequence[jax.Array]:
    """`reference.plan` of all ranks' counts, which the kernel itself exchanges if `comm` can."""
    n_ranks, n_physical = lax.axis_size(axis_name), len(assignment.counts)
    if order is None:
        slots = np.arange(n_physical // n_ranks, dtype=np.int32)
        order = np.broadcast_to(slots, (n_ranks, len(slots)))
    me, room = lax.axis_index(axis_name), workspace(assignment.position.size, n_ranks)
    fits = _fits(n_ranks, n_physical // n_ranks)
    if comm is not None and n_physical > comm.most_slots:
        comm = None
    if comm is not None and comm.fuses and fits:
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
    counts = all_gather_counts(counts, axis_name, comm)
    if comm is not None:
        counts = jnp.maximum(counts, 0)  # −1 after a failure: nothing has a row
    operands = (slot, position, counts.reshape(n_ranks, n_ranks, -1), order, me)
    if not fits:
        return reference.plan(*map(jnp.asarray, operands), capacity=capacity)
    return _native.call("lplb_plan", reference.plan, *operands, workspace=room, capacity=capacity)


def _fits(n_ranks: int, n_slots: int) -> bool:
    """Whether the counts of this many ranks fit in the kernel's shared memory.

    True without a GPU to query; native code then checks when the program runs.
    """
    extension = _native.cuda()
    if extension is None or jax.default_backend() != "gpu":
        return True
    return extension.plan_bytes(n_ranks, n_slots) <= extension.current_device().shared_bytes


def workspace(n_choices: int, n_ranks: int) -> tuple[int, int]:
    """The shape of the planning kernels' workspace; one block plans each part of a batch.

    With several parts, an extra kernel first counts what precedes each part.
    """
    return min(max(n_choices // 4096, 1), 64), n_ranks
