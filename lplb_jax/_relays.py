"""Which rank sends which copy to which, and when: relays, so that no link is the bottleneck.

An expert's home sends it to at most four ranks of its own node and to one rank of at most four
other nodes. In every round after that, each rank that has it sends it to three more: first the
ranks that received it for their node to other nodes, until all nodes that use it have it; then all
ranks within their nodes. Between nodes it travels once for each node. The gradients come home the
same way.

Copies are numbered rank by rank; of an expert's copies, those with lower numbers come first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

FIRST = 4  # ranks that a home sends an expert to; after a round, so many times as many have it


class Limits(NamedTuple):
    """Static bounds.

    Attributes:
      node_size: ranks of a node; all of them where there is one node.
      within: copies of an expert on its home's node.
      nodes: other nodes that have some.
      beyond: copies on each of these.
      first: how many of either its home sends at once.
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
        """Of these, to other nodes."""
        return min(self.nodes, self.first)

    @property
    def relayed(self) -> int:
        """Copies of an expert that a rank passes on in a round."""
        most = max(-(-max(self.within, self.nodes) // self.first), self.beyond) - 1
        return max(1, min(most, self.first - 1))

    @property
    def rounds(self) -> int:
        """As many as it may take until all have it."""
        return max(1, self.levels(self.within), self.abroad + self.levels(self.beyond))

    @property
    def abroad(self) -> int:
        """Rounds until all nodes have it."""
        return max(1, self.levels(self.nodes)) if self.nodes else 0

    def levels(self, n: int) -> int:
        """Rounds until n ranks have what one has, if those that have it serve `first` − 1 each."""
        return sum(self.first**k < n for k in range(n.bit_length()))


def limits(ep_size: int, n_nodes: int, most: int, per_rank: int | None = None) -> Limits:
    """For at most `most` copies of an expert, `per_rank` of them on a rank.

    None for one, and none on the home's rank.
    """
    node_size = ep_size // n_nodes
    within = node_size - 1 if per_rank is None else node_size * per_rank
    beyond = node_size * (per_rank or 1) if n_nodes > 1 else 0
    return Limits(node_size, *(min(most, n) for n in (within, n_nodes - 1, beyond)))


def direct(ep_size: int, most: int) -> Limits:
    """All copies are sent by homes, at once."""
    return Limits(ep_size, most, 0, 0, first=most)


class Journeys(NamedTuple):
    """How copies get to their ranks, int32 `[n_copies]` each.

    Attributes:
      round: when; −1 for those that do not travel.
      parent: the copy that is passed on; −1 where the home sends its own.
      child: which of the copies that its sender sends of it in that round.
    """

    round: jax.Array
    parent: jax.Array
    child: jax.Array


def journeys(
    expert: jax.Array, rank: jax.Array, owner: jax.Array, moves: jax.Array, limits: Limits
) -> Journeys:
    """Of copies of `expert` on `rank`, whose home is on `owner`, those that are to move.

    All are `[n_copies]`. More copies than the limits allow do not travel.
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

    # Ranks numbered below `span` have it already, and of each the one that many further on gets it.
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
    # A home sends to other nodes at the same time.
    beside = jnp.where(local, limits.sent_abroad, 0)
    child = jnp.where(from_home, beside + place, place // span - 1)
    return Journeys(jnp.where(moves, start, -1), jnp.where(from_home, -1, parent), child)
