"""Placements for exact balancing: built in several ways, evaluated by the exact solver."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np

from lplb_jax import _native
from lplb_jax._eplb import eplb

# Copies of an expert until its share of load is at most this many mean rank loads. 0: as in EPLB.
_MOST_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)
# Batches are scaled to about this many tokens.
_TOKENS = 1 << 40
# Future batches. Soon: single loads change by log-normal factors of this standard deviation.
# Later: loads keep this correlation (of logarithms) with an expert's present load, and count less.
_SOON_BATCHES, _SPREAD = 16, 0.2
_LATER_BATCHES, _STAYS, _CAUTION = 32, 0.5, 0.15
# The exact solver's budget while a table is changed: batches solved times slots.
_MOST_WORK = 1_200_000
# What keeping copies on their experts' nodes may cost on the given batches, in mean rank loads.
_FREE = 1e-3


class Table(NamedTuple):
    """A placement without topology.

    Attributes:
      phy2log: int32 `[n_physical]`, −1 for empty slots.
      homes: int32 `[n_logical]`, the home slot of every expert.
    """

    phy2log: np.ndarray
    homes: np.ndarray


class Sizes(NamedTuple):
    """The sizes of a placement."""

    n_logical: int
    ep_size: int
    slots_per_rank: int
    n_nodes: int = 1


def best_table(batches: np.ndarray, sizes: Sizes, further: Iterable[Table] = ()) -> Table:
    """The best of several placements for exact balancing of `batches` `[batches, n_logical]`.

    It minimizes the ratio of the largest to the mean rank load on the batches, on likely future
    ones and, with a lower weight, on batches whose experts have exchanged part of their loads.
    Placements that are worse than EPLB's on the given batches are excluded. If all are (its homes
    may be uneven, these may not), they are changed, best first, until one is as good.

    Args:
      batches: loads, finite and nonnegative, not all 0.
      sizes: sizes of the placement.
      further: other tables to choose from.
    """
    tokens = as_tokens(batches)
    soon, later = scenarios(tokens)
    mean = tokens.mean(axis=0)
    published = eplb(batches.sum(axis=0), sizes.ep_size, sizes.slots_per_rank).ravel()
    tables = [*constructions(mean, sizes), *further, with_even_homes(published, mean, sizes)]
    as_published = imbalances(published, sizes.ep_size, tokens)
    at_most = as_published.mean()

    def judge(tokens: np.ndarray) -> np.ndarray:
        return np.array(
            [imbalances(table.phy2log, sizes.ep_size, tokens).mean() for table in tables]
        )

    now = judge(tokens)
    if now.min() > at_most:
        for k in now.argsort():
            tables.append(amended(tables[k], tokens, as_published, sizes))
            if imbalances(tables[-1].phy2log, sizes.ep_size, tokens).mean() <= at_most:
                break
        now = judge(tokens)
    cost = now + judge(soon) + _CAUTION * np.log(judge(later))
    allowed = now <= max(at_most, now.min())
    cost[~allowed] = np.inf
    best = int(np.argmin(cost))
    if sizes.n_nodes == 1:
        return tables[best]
    abroad = np.array([_abroad(table, sizes) for table in tables])
    abroad[~allowed | (now > now[best] + _FREE)] = len(published)
    return tables[int(np.lexsort((cost, abroad))[0])]


def imbalances(phy2log: np.ndarray, ep_size: int, tokens: np.ndarray) -> np.ndarray:
    """Largest over mean rank load of batches int64 `[batches, n_logical]`, balanced exactly."""
    most = np.empty(len(tokens), np.int64)
    native().best_loads(
        np.ascontiguousarray(phy2log, np.int32).ravel(), ep_size, tokens.ravel(), most
    )
    return most * ep_size / tokens.sum(axis=1)


def native() -> ModuleType:
    """The native module, which placements without topology require."""
    cpu = _native.cpu()
    if cpu is None:
        raise RuntimeError(
            "method, previous: expected lplb_jax's native module for 'auto' and for previous, got "
            "none; reinstall it in its source tree with: pip install --force-reinstall --no-deps ."
        )
    return cpu


def as_tokens(batches: np.ndarray) -> np.ndarray:
    """Batches of equal size in whole tokens; batches without load are left out."""
    largest = batches.max(axis=1, keepdims=True)
    batches = batches[largest[:, 0] > 0] / largest[largest[:, 0] > 0]  # Sums stay finite.
    return np.rint(batches * (_TOKENS / batches.sum(axis=1, keepdims=True))).astype(np.int64)


def scenarios(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Future batches, soon and later; the same in every call."""
    random = np.random.default_rng(0)
    n_logical = tokens.shape[1]
    soon = np.resize(tokens, (_SOON_BATCHES, n_logical))
    soon = soon * np.exp(_SPREAD * random.standard_normal(soon.shape))
    logs = np.log(np.resize(tokens, (_LATER_BATCHES, n_logical)) + 0.02 * _TOKENS / n_logical)
    logs -= logs.mean(axis=1, keepdims=True)
    others = np.stack([batch[random.permutation(n_logical)] for batch in logs])
    later = np.exp(_STAYS * logs + np.sqrt(1 - _STAYS**2) * others)
    return as_tokens(soon), as_tokens(later)


def constructions(
    loads: np.ndarray, sizes: Sizes, home_ranks: np.ndarray | None = None
) -> Iterator[Table]:
    """Placements with second copies for all experts with small shares, packed or on far ranks.

    Args:
      loads: float64 `[n_logical]`.
      sizes: sizes of the placement.
      home_ranks: int32 `[n_logical]`, the prescribed home rank of each expert; None for any.
    """
    for stay in (False, True)[: 1 + (sizes.n_nodes > 1)]:
        for share in _MOST_SHARES:
            for in_advance, meet in ((True, 0.25), (False, 0.0)):
                table = Table(
                    np.empty(sizes.ep_size * sizes.slots_per_rank, np.int32),
                    np.empty(sizes.n_logical, np.int32),
                )
                how = stay, share, in_advance, meet
                native().place(loads, home_ranks, sizes.ep_size, sizes.n_nodes, *how, *table)
                yield table


def with_even_homes(phy2log: np.ndarray, loads: np.ndarray, sizes: Sizes) -> Table:
    """The table with homes spread as evenly as possible over the ranks, apart from padding.

    If a table allows no such homes, some copies make room for experts from ranks with too many
    homes: slots that serve nothing, if there are any, otherwise those with the least load.
    """
    phy2log, homes = np.array(phy2log, np.int32), np.empty(sizes.n_logical, np.int32)
    native().homes(phy2log, sizes.ep_size, homes)
    rank_of = np.arange(len(phy2log)) // sizes.slots_per_rank
    most = -(-sizes.n_logical // sizes.ep_size)
    while True:
        n_homes = np.bincount(rank_of[homes], minlength=sizes.ep_size)
        if n_homes.max() <= most:
            return Table(phy2log, homes)
        share = loads / np.bincount(phy2log[phy2log >= 0], minlength=sizes.n_logical)
        at_home = np.flatnonzero(rank_of[homes] == n_homes.argmax())
        expert = at_home[share[at_home].argmax()]
        slots = np.flatnonzero(rank_of == n_homes.argmin())
        there = slots[phy2log[slots] == expert]
        if len(there):  # Only an expert's first slot on a rank is used.
            homes[expert] = there[0]
            continue
        slots = slots[~np.isin(slots, homes)]
        held = phy2log[slots]
        twice = (held[:, None] == phy2log[rank_of == n_homes.argmin()]).sum(axis=1) > 1
        slot = slots[np.where((held < 0) | twice, -1.0, share[held]).argmin()]
        phy2log[slot], homes[expert] = expert, slot


def amended(
    table: Table, tokens: np.ndarray, goals: np.ndarray, sizes: Sizes, along: bool = False
) -> Table:
    """Changes the table until the imbalance of every batch is at most its goal or no change helps.

    Args:
      table: the table to change.
      tokens: batches int64 `[batches, n_logical]`.
      goals: float64 `[batches]`, ratios of the largest to the mean rank load.
      sizes: sizes of the table.
      along: whether the table is along a topology: experts then exchange all their slots.
    """
    phy2log, homes = (np.array(array, np.int32) for array in table)
    how = sizes.ep_size, sizes.n_nodes, along
    native().amend(phy2log, homes, *how, tokens.ravel(), goals, _MOST_WORK // len(phy2log))
    return Table(phy2log, homes)


def _abroad(table: Table, sizes: Sizes) -> int:
    """The number of copies on a node other than their expert's home node."""
    of_node = sizes.ep_size // sizes.n_nodes * sizes.slots_per_rank
    used = table.phy2log >= 0
    home = table.homes[table.phy2log[used]] // of_node
    return int(np.sum(home != np.flatnonzero(used) // of_node))
