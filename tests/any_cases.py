"""Placements of any kind, loads for them, and independent oracles."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np
from cases import INT32_MAX

from lplb_jax import Placement


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one problem; n_logical need not be a multiple of ep_size."""

    ep_size: int
    slots_per_rank: int
    n_logical: int

    @property
    def n_physical(self) -> int:
        return self.ep_size * self.slots_per_rank

    def phy2log(self, rng: np.random.Generator) -> np.ndarray:
        """A random table: every expert has a slot, some have many, and some slots are empty."""
        table = np.full(self.n_physical, -1, np.int32)
        order = rng.permutation(self.n_physical)
        table[order[: self.n_logical]] = rng.permutation(self.n_logical)
        n_copies = rng.integers(0, self.n_physical - self.n_logical, endpoint=True)
        # From even chances to nearly all copies for a few experts, including several on a rank.
        heat = rng.random(self.n_logical) ** rng.choice([0, 1, 4, 30])
        copies = rng.choice(self.n_logical, n_copies, p=heat / heat.sum())
        table[order[self.n_logical :][:n_copies]] = copies
        return table

    def phy2log_one_everywhere(self, rng: np.random.Generator) -> np.ndarray:
        """One expert is on every rank with a spare slot."""
        table = self.phy2log(rng).reshape(self.ep_size, -1)
        count = np.bincount(table[table >= 0], minlength=self.n_logical)
        for row in table:
            spare = np.flatnonzero((row < 0) | (count[row] > 1))
            if len(spare):
                slot = rng.choice(spare)
                count[row[slot]] -= row[slot] >= 0
                row[slot] = 0
        return table.ravel()

    def hosts(self, phy2log: np.ndarray) -> np.ndarray:
        """Whether expert e is on rank r, bool `[n_logical, ep_size]`."""
        hosts = np.zeros((self.n_logical, self.ep_size), bool)
        slot = np.flatnonzero(phy2log >= 0)
        hosts[phy2log[slot], slot // self.slots_per_rank] = True
        return hosts


SIZES = {
    "one rank": Sizes(1, 3, 2),
    "no room": Sizes(4, 2, 8),
    "2 x 3": Sizes(2, 3, 3),
    "3 x 4": Sizes(3, 4, 7),
    "5 x 7": Sizes(5, 7, 11),
    "8 x 6": Sizes(8, 6, 32),
    "8 x 40": Sizes(8, 40, 250),
    "16 x 5": Sizes(16, 5, 33),
    "33 x 3": Sizes(33, 3, 64),
    "64 x 6": Sizes(64, 6, 256),
    "65 x 2": Sizes(65, 2, 70),
    "128 x 3": Sizes(128, 3, 256),
    "128 x 40": Sizes(128, 40, 2048),
}
SMALL_SIZES = {name: SIZES[name] for name in ["one rank", "no room", "3 x 4", "8 x 6", "16 x 5"]}


@dataclasses.dataclass(frozen=True)
class AnyCase:
    """Like `cases.Case`, for any placement: one group of all ranks."""

    sizes: Sizes
    n_groups: int = 1

    @property
    def r2o(self) -> np.ndarray:
        return np.zeros((self.ep_size, 0), np.int32)

    @property
    def ep_size(self) -> int:
        return self.sizes.ep_size

    @property
    def n_logical(self) -> int:
        return self.sizes.n_logical

    def placement(self, rng: np.random.Generator) -> Placement:
        """A random placement; now and then, one expert is everywhere."""
        table = self.sizes.phy2log if rng.random() < 0.8 else self.sizes.phy2log_one_everywhere
        return Placement.from_phy2log(
            table(rng).reshape(self.ep_size, -1), ep_size=self.ep_size, n_logical=self.n_logical
        )


def loads_for(rng: np.random.Generator, sizes: Sizes, hosts: np.ndarray) -> np.ndarray:
    """Loads of a random kind, int32 `[n_logical]`, with sums below 2³¹ on every rank."""
    n = sizes.n_logical
    kind = rng.integers(7)
    if kind == 0:
        return rng.integers(0, 100, n).astype(np.int32)
    if kind == 1:
        return rng.lognormal(4, 1.5, n).astype(np.int32)
    if kind == 2:
        return np.minimum(rng.zipf(1.5, n), 10**6).astype(np.int32) % 10**5
    if kind == 3:  # half of the experts have nothing
        return (rng.integers(0, 1000, n) * rng.integers(0, 2, n)).astype(np.int32)
    if kind == 4:  # one has everything
        return np.where(np.arange(n) == rng.integers(n), rng.integers(INT32_MAX), 0).astype(
            np.int32
        )
    if kind == 5:  # fewer tokens than ranks
        return rng.multinomial(sizes.ep_size // 2 + 1, np.full(n, 1 / n)).astype(np.int32)
    # Totals above 2³¹ with enough ranks; the fullest rank could get almost 2³¹.
    loads = rng.integers(0, INT32_MAX, n).astype(float)
    return (loads * (INT32_MAX - n) / (loads @ hosts).max()).astype(np.int32)


def without_a_slot(rng: np.random.Generator, sizes: Sizes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables `[n, n_physical]` without some experts, and loads `[n, ep_size, n_logical]`, some of
    them negative or above int32's range, including loads of missing experts."""
    tables, loads = [], []
    for _ in range(n):
        table = sizes.phy2log(rng)
        table[np.isin(table, rng.choice(sizes.n_logical, rng.integers(1, 4)))] = rng.choice([-1, 0])
        of_sources = rng.multinomial(
            rng.choice([100, 10**7]), np.full(sizes.n_logical, 1 / sizes.n_logical), sizes.ep_size
        )
        spoilt = rng.choice(sizes.n_logical, 2)
        of_sources[rng.integers(sizes.ep_size), spoilt] = rng.choice([-7, INT32_MAX])
        tables.append(table)
        loads.append(of_sources)
    return np.stack(tables), np.stack(loads).astype(np.int32)


def can_improve(quota: np.ndarray, phy2log: np.ndarray, sizes: Sizes) -> bool:
    """Whether another split has a smaller largest load, in integers of any size.

    In a plan whose largest load is M, one token has to leave each rank with M, for ranks with less
    than M − 1: a maximum flow by single augmenting paths.
    """
    tokens = np.zeros((sizes.n_logical, sizes.ep_size), np.int64)
    slot = np.flatnonzero(phy2log >= 0)
    np.add.at(tokens, (phy2log[slot], slot // sizes.slots_per_rank), quota[slot])
    hosts = sizes.hosts(phy2log)
    load = tokens.sum(axis=0)
    target = load.max() - 1
    experts = [np.flatnonzero(hosts[:, r]) for r in range(sizes.ep_size)]
    while (load > target).any():
        start = int(load.argmax())
        came: dict[int, tuple[int, int]] = {start: (-1, -1)}
        queue = deque([start])
        end = -1
        while queue and end < 0:
            r = queue.popleft()
            for e in experts[r][tokens[experts[r], r] > 0]:
                for q in map(int, np.flatnonzero(hosts[e])):
                    if q not in came:
                        came[q] = (r, int(e))
                        queue.append(q)
                        if load[q] < target:
                            end = q
        if end < 0:
            return False
        load[start] -= 1
        load[end] += 1
        while end != start:
            r, e = came[end]
            tokens[e, r] -= 1
            tokens[e, end] += 1
            end = r
    return True


def deal_slowly(
    count: list[int], quota: list[int], rank_of: list[int], node_size: int
) -> list[list[int]]:
    """For every source, the hosts of one expert's tokens in order, token by token.

    `quota[k]` is the quota of the host on rank `rank_of[k]`.
    """
    dealt: list[list[int]] = [[] for _ in count]
    left, room = list(count), list(quota)
    for k, r in enumerate(rank_of):
        own = min(left[r], room[k])
        dealt[r] += [k] * own
        left[r] -= own
        room[k] -= own
    nodes = [range(v, v + node_size) for v in range(0, len(count), node_size)]
    for ranks in [*nodes, range(len(count))]:
        sources = [s for s in ranks for _ in range(left[s])]
        hosts = [k for k, r in enumerate(rank_of) if r in ranks for _ in range(room[k])]
        for s, k in zip(sources, hosts, strict=False):
            dealt[s].append(k)
            left[s] -= 1
            room[k] -= 1
    return dealt
