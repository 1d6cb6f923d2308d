"""Placements that keep as much of the previous one as costs almost no balance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lplb_jax._portfolio import (
    Sizes,
    Table,
    amended,
    as_tokens,
    constructions,
    imbalances,
    scenarios,
    with_even_homes,
)

# How much worse than a fresh placement one that keeps more may be, as a factor of the largest rank
# load: on the given batches, and on average over likely future ones. A few of the latter suffice
# during the search.
_WORSE, _SOON_WORSE, _SOON_BATCHES = 1.009, 1.05, 3


def keep(
    previous: Table, fresh: Table, batches: np.ndarray, sizes: Sizes, *, along: bool = False
) -> Table:
    """`previous` with the fewest changes that make it nearly as good as `fresh`; or else `fresh`.

    Args:
      previous: the placement in use.
      fresh: a placement made for the batches.
      batches: loads `[batches, n_logical]`, finite and nonnegative, not all 0.
      sizes: sizes of both placements.
      along: whether both are along one topology. Experts then exchange all their slots. Otherwise
        experts that stay on a rank keep their slots, and the ranks of `fresh` are renumbered.
    """
    tokens = as_tokens(batches)
    soon, _ = scenarios(tokens)
    aims = _Aims(
        tokens,
        _WORSE * imbalances(fresh.phy2log, sizes.ep_size, tokens),
        soon,
        _SOON_WORSE * imbalances(fresh.phy2log, sizes.ep_size, soon),
    )
    reaching = (
        table
        for table in _candidates(previous, aims, sizes, along)
        if aims.reached(table, sizes.ep_size)
    )
    if along:
        return next(reaching, fresh)
    table = next(reaching, None)
    if table is None:
        return _in_old_slots(fresh, _similar_ranks(fresh, previous, sizes), previous, sizes)
    return _in_old_slots(table, np.arange(sizes.ep_size), previous, sizes)


class _Aims(NamedTuple):
    """The given batches and likely future ones, and the largest rank loads allowed for them."""

    tokens: np.ndarray
    as_is: np.ndarray
    soon: np.ndarray
    of_soon: np.ndarray

    def reached(self, table: Table, ep_size: int) -> bool:
        as_is, of_soon = (imbalances(table.phy2log, ep_size, of) for of in (self.tokens, self.soon))
        return bool(np.all(as_is <= self.as_is) and of_soon.mean() <= self.of_soon.mean())


def _candidates(previous: Table, aims: _Aims, sizes: Sizes, along: bool) -> Iterator[Table]:
    """Placements that keep ever less of `previous`."""
    mean = aims.tokens.mean(axis=0)
    n_homes = np.bincount(previous.homes // sizes.slots_per_rank)
    if n_homes.max() * sizes.ep_size >= sizes.n_logical + sizes.ep_size:
        previous = with_even_homes(previous.phy2log, mean, sizes)
    least = amended(previous, aims.tokens, aims.as_is, sizes, along)
    yield least
    few = slice(_SOON_BATCHES)
    tokens = np.concatenate([aims.tokens, aims.soon[few]])
    goals = np.concatenate([aims.as_is, aims.of_soon[few]])
    yield amended(least, tokens, goals, sizes, along)
    if not along:
        homes = previous.homes // sizes.slots_per_rank
        yield from constructions(mean, sizes, homes.astype(np.int32))


def _similar_ranks(fresh: Table, previous: Table, sizes: Sizes) -> np.ndarray:
    """For every rank, the rank of `fresh` with much the same experts; nodes stay together."""
    n_nodes, node_size = sizes.n_nodes, sizes.ep_size // sizes.n_nodes
    # Experts that rank r had and rank q would have; those at home on both count twice.
    members = zip(_members(previous, sizes), _members(fresh, sizes), strict=True)
    common = np.sum([had.T.astype(np.int64) @ has for had, has in members], axis=0)
    pairs = common.reshape(n_nodes, node_size, n_nodes, node_size).swapaxes(1, 2)
    rank_of = np.array([[_matched(pair) for pair in row] for row in pairs])
    node_of = _matched(np.take_along_axis(pairs, rank_of[..., None], axis=3).sum(axis=(2, 3)))
    return (node_of[:, None] * node_size + rank_of[np.arange(n_nodes), node_of]).ravel()


def _matched(value: np.ndarray) -> np.ndarray:
    """Assigns every row a distinct column greedily, highest values first."""
    left = value.astype(np.float64)
    column = np.empty(len(left), int)
    for _ in range(len(left)):
        row, best = divmod(int(left.argmax()), len(left))
        column[row] = best
        left[row], left[:, best] = -np.inf, -np.inf
    return column


def _members(table: Table, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Which experts are on which rank, and which have their home there, `[n_logical, ep_size]`."""
    on_rank, at_home = np.zeros((2, sizes.n_logical, sizes.ep_size), bool)
    slot = np.flatnonzero(table.phy2log >= 0)
    on_rank[table.phy2log[slot], slot // sizes.slots_per_rank] = True
    at_home[np.arange(sizes.n_logical), table.homes // sizes.slots_per_rank] = True
    return on_rank, at_home


def _in_old_slots(table: Table, ranks: np.ndarray, previous: Table, sizes: Sizes) -> Table:
    """Rank r gets the experts of the table's rank `ranks[r]`; those it had keep their slots."""
    old = previous.phy2log.reshape(sizes.ep_size, -1)
    new = table.phy2log.reshape(sizes.ep_size, -1)[ranks]
    for had, has in zip(old, new, strict=True):
        rest = has.tolist()
        stays = np.zeros(len(rest), bool)
        for k, expert in enumerate(had.tolist()):
            if expert in rest:
                rest.remove(expert)
                stays[k] = True
        has[stays], has[~stays] = had[stays], rest
    rank = np.argsort(ranks)[table.homes // sizes.slots_per_rank]
    first = (new[rank] == np.arange(sizes.n_logical)[:, None]).argmax(axis=1)
    return Table(new.ravel(), (rank * sizes.slots_per_rank + first).astype(np.int32))
