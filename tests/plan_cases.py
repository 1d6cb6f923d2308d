"""Random batches, and their plans computed row by row in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lplb_jax import _native, reference
from lplb_jax.moe.plan import workspace


@dataclasses.dataclass(frozen=True)
class PlanCase:
    """Arguments of `reference.plan` on rank `me`; `slots` [ep_size, tokens, top_k] are all ranks'.

    `groups` [ep_size, n_groups] has every slot at most once, and the number of slots for none.
    """

    slots: np.ndarray
    groups: np.ndarray
    n_slots: int
    me: int
    capacity: int

    @property
    def counts(self) -> np.ndarray:
        n_ranks, n_physical = len(self.slots), len(self.slots) * self.n_slots
        counts = [np.bincount(s[s >= 0], minlength=n_physical) for s in self.slots]
        return np.stack(counts).astype(np.int32).reshape(n_ranks, n_ranks, self.n_slots)

    @property
    def operands(self) -> tuple[Any, ...]:
        own = self.slots[self.me]
        return own, positions(own), self.counts, self.groups, np.int32(self.me)

    def run(self) -> tuple[jax.Array, ...]:
        """The plan of gathered counts, natively on a GPU."""
        slots = self.operands[0]
        return jax.jit(
            lambda *operands: _native.call(
                "lplb_plan",
                reference.plan,
                *operands,
                workspace=workspace(slots.size, len(self.slots)),
                capacity=self.capacity,
            )
        )(*self.operands)

    def rows(self) -> np.ndarray:
        """rank · capacity + row of every source's choices, or −1."""
        rank, slot = np.divmod(self.slots.ravel(), self.n_slots)
        group = np.full((len(self.groups), self.n_slots + 2), -1)
        numbers = np.broadcast_to(np.arange(self.groups.shape[1]), self.groups.shape)
        np.put_along_axis(group, self.groups, numbers, axis=1)
        # A stable sort keeps the order of sources, and of each source's choices.
        by_place = np.lexsort((group[rank, slot], rank))
        by_place = by_place[self.slots.ravel()[by_place] >= 0]
        first = np.searchsorted(rank[by_place], np.arange(len(self.groups)))
        row = np.arange(len(by_place)) - first[rank[by_place]]
        rows = np.full(self.slots.size, -1, np.int32)
        rows[by_place] = np.where(row < self.capacity, rank[by_place] * self.capacity + row, -1)
        return rows.reshape(self.slots.shape)

    def expected(self) -> list[np.ndarray]:
        """row, order, lists, group_sizes, slot_loads, overflow."""
        n_ranks, n_tokens, _ = self.slots.shape
        rows = self.rows()
        ranks = np.where(rows < 0, -1, rows // self.capacity)
        own = ranks[self.me]
        order = np.full(own.shape, -1, np.int32)
        sizes = np.zeros(n_ranks, np.int32)
        for rank in set(range(n_ranks)) - {self.me}:
            tokens = np.flatnonzero((own == rank).any(axis=1))
            order[tokens, (own[tokens] == rank).argmax(axis=1)] = np.arange(len(tokens))
            sizes[rank] = len(tokens)
        room = np.zeros((n_ranks, n_ranks), np.int64)
        for source, rank in np.ndindex(room.shape):
            if source != rank:
                room[source, rank] = min((ranks[source] == rank).sum(), n_tokens)
        there, home = (np.cumsum(room, axis=axis) - room for axis in (0, 1))
        me = self.me
        lists = np.stack([sizes, there[me], there[:, me], home[:, me], home[me]])
        loads = self.counts.sum(axis=0)
        total = self.counts.sum(axis=(0, 2))
        here = rows[ranks == me] - me * self.capacity
        used = np.append(self.counts.sum(axis=0)[me], 0)[self.groups[me]]
        ends = np.cumsum(used)
        group_sizes = np.minimum(ends, len(here)) - np.minimum(ends - used, len(here))
        overflow = np.maximum(total - self.capacity, 0).sum()
        return [rows[me], order, lists, group_sizes, loads.ravel(), overflow]


def positions(slots: np.ndarray) -> np.ndarray:
    """The number of earlier choices with the same slot, for every choice; −1 without a slot."""
    flat = slots.ravel()
    by_slot = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[by_slot], flat[by_slot])
    position = np.empty_like(flat)
    position[by_slot] = np.arange(len(flat)) - starts
    return np.where(slots < 0, -1, position.reshape(slots.shape)).astype(np.int32)


def random_case(
    rng: np.random.Generator, n_ranks: int, n_slots: int, n_tokens: int, top_k: int
) -> PlanCase:
    """A random case, maybe with little room, tokens without choices, or slots without groups."""
    shape = n_ranks, n_tokens, top_k
    slots = rng.integers(0, n_ranks * n_slots, shape)
    if rng.random() < 0.3:
        slots[:] = rng.integers(n_slots) + n_slots * rng.integers(n_ranks)
    slots[rng.random(shape) < rng.choice([0, 0.1, 0.9, 1])] = -1
    groups = np.tile(np.arange(n_slots), (n_ranks, 1))
    if rng.random() < 0.5:
        n_groups = rng.integers(1, n_slots + 3)
        groups = np.stack([rng.permutation(n_slots + 2)[:n_groups] for _ in range(n_ranks)])
    grouped = np.stack([np.isin(np.arange(n_slots), of_rank) for of_rank in groups])
    slots[(slots >= 0) & ~grouped.ravel()[slots]] = -1
    most = n_tokens * top_k * n_ranks
    capacity = int(rng.integers(1, most + 1)) if rng.random() < 0.5 else most
    groups = np.minimum(groups, n_slots).astype(np.int32)
    return PlanCase(slots.astype(np.int32), groups, n_slots, int(rng.integers(n_ranks)), capacity)


def check(got: tuple, case: PlanCase) -> None:
    """Raises if a plan differs from the expected one."""
    names = ("row", "order", "lists", "group_sizes", "slot_loads", "overflow")
    for name, a, b in zip(names, got, case.expected(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
