"""Placements for exact balancing: made in several ways, judged by the exact solver."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import numpy as np

from lplb_jax import _native
from lplb_jax._eplb import eplb

# Copies of an expert until its share of load is at most so many mean rank loads. 0: as EPLB does.
_MOST_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)
# Batches are scaled to about so many tokens.
_TOKENS = 1 << 20
# What may become of a batch. Soon: single loads change, by factors of this spread (of logarithms).
# Later: this much of an expert's load stays with it (a correlation of logarithms), and that counts
# less.
_SOON_BATCHES, _SPREAD = 16, 0.2
_LATER_BATCHES, _STAYS, _CAUTION = 32, 0.5, 0.15
# What copies on their experts' nodes may cost on the batches as they are, in mean rank loads.
_FREE = 1e-3


class Table(NamedTuple):
    """A placement without topology.

    Attributes:
      phy2log: int32 `[n_physical]`, −1 where a slot is empty.
      homes: int32 `[n_logical]`, the home slot of every expert.
    """

    phy2log: np.ndarray
    homes: np.ndarray


class Sizes(NamedTuple):
    """Of a placement without topology."""

    n_logical: int
    ep_size: int
    slots_per_rank: int
    n_nodes: int


def best_table(batches: np.ndarray, sizes: Sizes, further: Iterable[Table] = ()) -> Table:
    """The best of several placements for exact balancing of `batches` `[batches, n_logical]`.

    That is the one with the least largest over mean rank load, on the batches, on what may soon
    become of them, and, to a lesser degree, on batches whose experts have exchanged part of their
    loads. None is taken that is worse than EPLB's on the batches as they are, unless all are.

    Args:
      batches: loads, finite and not negative, not all 0.
      sizes: of the placement.
      further: other tables to choose among.
    """
    tokens = _as_tokens(batches)
    soon, later = _scenarios(tokens)
    mean = tokens.mean(axis=0)
    published = eplb(batches.sum(axis=0), sizes.ep_size, sizes.slots_per_rank).ravel()
    tables = [*_constructions(mean, sizes), *further, *_if_homes_are_even(published, sizes)]
    at_most = imbalance(published, sizes.ep_size, tokens)

    def judge(tokens: np.ndarray) -> np.ndarray:
        return np.array([imbalance(table.phy2log, sizes.ep_size, tokens) for table in tables])

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


def imbalance(phy2log: np.ndarray, ep_size: int, tokens: np.ndarray) -> float:
    """Largest over mean rank load of `tokens`, int64 `[batches, n_logical]`, balanced exactly."""
    most = np.empty(len(tokens), np.int64)
    _cpu().best_loads(
        np.ascontiguousarray(phy2log, np.int32).ravel(), ep_size, tokens.ravel(), most
    )
    return float(np.mean(most * ep_size / tokens.sum(axis=1)))


def _cpu() -> ModuleType:
    cpu = _native.cpu()
    if cpu is None:
        raise RuntimeError(
            "method: expected lplb_jax's native module for 'auto', got none; reinstall it in its "
            "source tree with: pip install --force-reinstall --no-deps ."
        )
    return cpu


def _as_tokens(batches: np.ndarray) -> np.ndarray:
    """Batches of equal size in whole tokens; those without load are left out."""
    largest = batches.max(axis=1, keepdims=True)
    batches = batches[largest[:, 0] > 0] / largest[largest[:, 0] > 0]  # Sums stay finite.
    return np.rint(batches * (_TOKENS / batches.sum(axis=1, keepdims=True))).astype(np.int64)


def _scenarios(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Batches as they may become, soon and later; the same ones in every call."""
    random = np.random.default_rng(0)
    n_logical = tokens.shape[1]
    soon = np.resize(tokens, (_SOON_BATCHES, n_logical))
    soon = soon * np.exp(_SPREAD * random.standard_normal(soon.shape))
    logs = np.log(np.resize(tokens, (_LATER_BATCHES, n_logical)) + 0.02 * _TOKENS / n_logical)
    logs -= logs.mean(axis=1, keepdims=True)
    others = np.stack([batch[random.permutation(n_logical)] for batch in logs])
    later = np.exp(_STAYS * logs + np.sqrt(1 - _STAYS**2) * others)
    return _as_tokens(soon), _as_tokens(later)


def _constructions(loads: np.ndarray, sizes: Sizes) -> Iterable[Table]:
    """Second copies for all where shares are small enough, packed or lent to far ranks."""
    for stay in (False, True)[: 1 + (sizes.n_nodes > 1)]:
        for share in _MOST_SHARES:
            for in_advance, meet in ((True, 0.25), (False, 0.0)):
                table = Table(
                    np.empty(sizes.ep_size * sizes.slots_per_rank, np.int32),
                    np.empty(sizes.n_logical, np.int32),
                )
                _cpu().place(
                    loads, sizes.ep_size, sizes.n_nodes, stay, share, in_advance, meet, *table
                )
                yield table


def _if_homes_are_even(phy2log: np.ndarray, sizes: Sizes) -> Iterable[Table]:
    """The table, if no rank has to be home of more experts than others, but for padding."""
    homes = np.empty(sizes.n_logical, np.int32)
    _cpu().homes(phy2log, sizes.ep_size, homes)
    count = np.bincount(homes // sizes.slots_per_rank, minlength=sizes.ep_size)
    if count.max() * sizes.ep_size < sizes.n_logical + sizes.ep_size:
        yield Table(phy2log, homes)


def _abroad(table: Table, sizes: Sizes) -> int:
    """Copies that are on another node than their expert's home."""
    of_node = sizes.ep_size // sizes.n_nodes * sizes.slots_per_rank
    used = table.phy2log >= 0
    home = table.homes[table.phy2log[used]] // of_node
    return int(np.sum(home != np.flatnonzero(used) // of_node))
