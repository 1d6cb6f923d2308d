"""Which rank sends which copy to which, and when: relays, so that no link is the bottleneck.

An expert's home sends it to at most four ranks of its own node and to one rank in each of at most
four other nodes. In every later round, each copy is passed on three times: first to other nodes,
from the ranks that received it for their node, until all nodes that use it have it; then within the
nodes, from all ranks. It enters each node once. The gradients come home the same way.

Copies are numbered rank by rank; among an expert's copies, lower numbers come first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

FIRST = 4  # ranks that a home sends an expert to; each round multiplies its holders by this factor


class Limits(NamedTuple):
    """Static bounds.

    Attributes:
      node_size: ranks per node; all of them if there is one node.
      within: copies of an expert on its home's node.
      nodes: other nodes with copies.
      beyond: copies on each of these.
      first: how many its home sends at once, within the node and to other nodes alike.
    """

    node_size: int
    within: int
    nodes: int
    beyond: int
    first: int = FIRST

    @property
    def sent(self) -> int:
        """Copies of an expert that its home sends."""
        return max(1, min(self.within, self.first) + self.sent_abroad)

    @property
    def sent_abroad(self) -> int:
        """Copies of an expert that its home sends to other nodes."""
        return min(self.nodes, self.first)

    @property
    def relayed(self) -> int:
        """How often a copy is passed on in a round."""
        most = max(-(-max(self.within, self.nodes) // self.first), self.beyond) - 1
        return max(1, min(most, self.first - 1))

    @property
    def rounds(self) -> int:
        """The most rounds until all copies have arrived."""
        return max(1, self.levels(self.within), self.abroad + self.levels(self.beyond))

    @property
    def abroad(self) -> int:
        """Rounds until all nodes have the expert."""
        return max(1, self.levels(self.nodes)) if self.nodes else 0

    def levels(self, n: int) -> int:
        """Rounds until n ranks have what one has, if each holder sends to `first` − 1 per round."""
        return sum(self.first**k < n for k in range(n.bit_length()))


def limits(ep_size: int, n_nodes: int, most: int, per_rank: int | None = None) -> Limits:
    """The limits for at most `most` copies of an expert, `per_rank` of them on a rank.

    `per_rank` None: one per rank, and none on the home's rank.
    """
    node_size = ep_size // n_nodes
    within = node_size - 1 if per_rank is None else node_size * per_rank
    beyond = node_size * (per_rank or 1) if n_nodes > 1 else 0
    return Limits(node_size, *(min(most, n) for n in (within, n_nodes - 1, beyond)))


def direct(ep_size: int, most: int) -> Limits:
    """The limits if homes send all copies, at once."""
    return Limits(ep_size, most, 0, 0, first=most)


class Journeys(NamedTuple):
    """How copies get to their ranks, int32 `[n_copies]` each.

    Attributes:
      round: when it travels; −1 if it does not.
      parent: the copy that is passed on; −1 if the home sends it.
      child: its index among the copies that its sender passes on in that round.
    """

    round: jax.Array
    parent: jax.Array
    child: jax.Array


def journeys(
    expert: jax.Array, rank: jax.Array, owner: jax.Array, moves: jax.Array, limits: Limits
) -> Journeys:
    """The journeys of copies of `expert` on `rank`, whose home is on `owner`.

    All are `[n_copies]`. Copies beyond the limits do not travel.
    """
    node = rank // limits.node_size
    local = node == owner // limits.node_size
    number = jnp.arange(len(expert), dtype=jnp.int32)
    same = moves[None] & (expert[None] == expert[:, None])

    def nth(of_same: jax.Array) -> jax.Array:
        return (of_same & (number[None] < number[:, None])).sum(axis=1, dtype=jnp.int32)

    of_node = same & (node[None] == node[:, None])
    in_node = nth(of_node)
    leads = moves & ~local & (in_node == 0)
    leaders = same & leads[None]
    of_leaders = nth(leaders)
    place = jnp.where(leads, of_leaders, in_node)
    most = jnp.where(leads, limits.nodes, jnp.where(local, limits.within, limits.beyond))
    moves = moves & (place < most)

    # Ranks numbered below `span` already have it; each sends to the rank that many further on.
    level, span = jnp.zeros_like(place), jnp.ones_like(place)
    for k in range(limits.levels(max(limits.within, limits.nodes, limits.beyond))):
        later = place >= limits.first**k
        level, span = level + later.astype(jnp.int32), jnp.where(later, limits.first**k, span)
    from_home = (leads | local) & (level <= 1)
    start = jnp.where(leads | local, jnp.maximum(level - 1, 0), limits.abroad + level - 1)
    sender = (place % span)[:, None]
    is_parent = jnp.where(
        leads[:, None],
        leaders & (of_leaders[None] == sender),
        of_node & (in_node[None] == sender),
    )
    parent = jnp.where(is_parent, number[None], 0).sum(axis=1, dtype=jnp.int32)
    # Homes send to other nodes at the same time.
    beside = jnp.where(local, limits.sent_abroad, 0)
    child = jnp.where(from_home, beside + place, place // span - 1)
    return Journeys(jnp.where(moves, start, -1), jnp.where(from_home, -1, parent), child)
