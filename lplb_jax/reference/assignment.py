"""From quotas to tokens: which slot serves every token of one source rank."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, Integer

from lplb_jax.reference import graph
from lplb_jax.reference.loads import expert_or_none
from lplb_jax.reference.sums import INT32_MAX, capped_add, exact_sum


def assign(
    indices: Integer[Array, " tokens"],
    counts: Int32[Array, "n_sources row"],
    quota: Int32[Array, " n_physical"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    rank: Int32[Array, ""],
    *,
    ep_size: int,
    node_size: int,
    proportional: int,
    positions: int,
) -> tuple[Int32[Array, " tokens"], Int32[Array, " tokens_or_0"], Int32[Array, " physical_or_0"]]:
    """Physical slot of every token, −1 if it names no expert.

    With `positions`, also every token's place among this source's tokens of its slot, in order, and
    the tokens per slot; otherwise two empty arrays.

    `counts` are the tokens per expert of all source ranks; `indices` belong to source `rank`. A
    single row counts `indices` alone: these are the whole batch or, with `proportional`, this
    source's part of a batch whose loads are estimates. `node_size` is 0 along a topology, and the
    ranks per node for any other placement.

    A slot that log2phy lists for an expert counts only if phy2log has the expert there: if a
    placement contradicts itself, tokens may get no slot, but never another expert's.
    """
    n_logical = log2phy.shape[0]
    counts = jnp.maximum(counts[:, :n_logical], 0)
    # The solvers' quotas are never negative and sum to at most int32's maximum; others may not.
    quota = jnp.maximum(quota, 0)
    if node_size:
        cells = graph.cells_of(phy2log, log2phy, ep_size)
        pieces = pieces_anywhere(counts, quota, cells, rank, node_size, bool(proportional))
    else:
        pieces = pieces_along_topology(
            counts, quota, phy2log, log2phy, rank, ep_size, bool(proportional)
        )

    expert = expert_or_none(indices, n_logical)
    ordinal = ordinals(expert)
    which = (ordinal[:, None] >= pieces.end[expert, :-1]).sum(axis=1, dtype=jnp.int32)
    slot = jnp.where(expert >= 0, pieces.slot[expert, which], -1)
    known = is_slot(slot, quota.size)
    slot = jnp.where(known, slot, -1)
    if not positions:
        return slot, slot[:0], quota[:0]
    start = jnp.where(which > 0, pieces.end[expert, which - 1], 0)
    bins = jnp.where(known, slot, quota.size)
    counts = jnp.zeros_like(quota).at[bins].add(1, mode="drop")
    return slot, jnp.where(known, ordinal - start, -1), counts


class Pieces(NamedTuple):
    """How a source deals an expert's tokens: the first slot takes tokens up to its end, and so on.

    The last slot takes the rest.
    """

    slot: Int32[Array, "n_logical n_pieces"]  # out of range: no slot for these tokens
    end: Int32[Array, "n_logical n_pieces"]  # nondecreasing


def pieces_along_topology(
    counts: Int32[Array, "n_sources n_logical"],
    quota: Int32[Array, " n_physical"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    rank: Int32[Array, ""],
    ep_size: int,
    proportional: bool,
) -> Pieces:
    """Home and replica: home gets its quota minus what the sources before `rank` send there."""
    (home, has_home), (replica, has_replica) = (own_slot(phy2log, log2phy[:, k]) for k in (0, 1))
    stay, away = quota[jnp.where(has_home, home, 0)], quota[jnp.where(has_replica, replica, 0)]
    if proportional:
        load = capped_add(stay, away)
        keep = proportional_share(counts[0], stay, load, rank, ep_size)
    elif counts.shape[0] == 1:
        keep = stay
    else:
        slots_per_rank = quota.size // ep_size
        before = tokens_before(counts, home // slots_per_rank, replica // slots_per_rank, rank)
        keep = jnp.maximum(stay - before, 0)
    # The tokens of an expert with one slot have no other choice.
    keep = jnp.where(has_home & has_replica, keep, INT32_MAX)
    return Pieces(
        jnp.stack([home, replica], axis=1), jnp.stack([keep, jnp.full_like(keep, INT32_MAX)], 1)
    )


def own_slot(
    phy2log: Int32[Array, " n_physical"], slot: Int32[Array, " n_logical"]
) -> tuple[Int32[Array, " n_logical"], Bool[Array, " n_logical"]]:
    """Every expert's slot, −1 if log2phy lists none that holds it; and whether it lists one."""
    expert = jnp.arange(slot.size, dtype=jnp.int32)
    known = (slot >= 0) & (phy2log.at[slot].get(mode="fill", fill_value=-1) == expert)
    return jnp.where(known, slot, -1), known


def pieces_anywhere(
    counts: Int32[Array, "n_sources n_logical"],
    quota: Int32[Array, " n_physical"],
    cells: graph.Cells,
    rank: Int32[Array, ""],
    node_size: int,
    proportional: bool,
) -> Pieces:
    """A piece per rank, mostly empty; tokens past the last end go to the last nonempty piece.

    An expert's quotas count up to a running sum of 2³¹ − 1, which the solver's never exceed.
    """
    ep_size = cells.slot.shape[1]
    nth = jnp.arange(ep_size, dtype=jnp.int32)
    quota = quota.at[cells.slot].get(mode="fill", fill_value=0)
    upto = lax.associative_scan(capped_add, quota, axis=1)
    order = nth
    if proportional:
        count, load = (jnp.broadcast_to(x[:, None], upto.shape) for x in (counts[0], upto[:, -1]))
        share = proportional_share(count, upto, load, rank, ep_size)
        take = jnp.where(load > 0, jnp.diff(share, axis=1, prepend=0), 0)
    elif counts.shape[0] == 1:
        take = jnp.diff(upto, axis=1, prepend=0)
    else:
        take = local_shares(counts.T, jnp.diff(upto, axis=1, prepend=0), rank, node_size)
        # Own rank, own node, then the others; each in rank order.
        far = (nth // node_size != rank // node_size).astype(jnp.int32)
        order = jnp.argsort(far + (nth != rank).astype(jnp.int32), stable=True)
    take = take[:, order]
    last = jnp.where(take > 0, nth, 0).max(axis=1, keepdims=True)
    end = jnp.where(nth < last, jnp.cumsum(take, axis=1, dtype=jnp.int32), INT32_MAX)
    some = (take > 0).any(axis=1, keepdims=True)
    return Pieces(jnp.where(some, cells.slot[:, order], cells.home[:, None]), end)


def local_shares(
    count: Int32[Array, "n_logical ep_size"],
    quota: Int32[Array, "n_logical ep_size"],
    rank: Int32[Array, ""],
    node_size: int,
) -> Int32[Array, "n_logical ep_size"]:
    """Tokens that source `rank` sends to every rank, such that the quotas are met exactly.

    First every source keeps what its own rank's quota takes. Then, in each node, the sources'
    remaining tokens are laid end to end in rank order, and so are the remaining quotas: a token
    goes to the rank whose quota is at the same place. The line ends with its shorter side. What
    remains is matched in the same way over all nodes. No rule with these quotas keeps more tokens
    on their own rank and, among such rules, on their own node. No source needs another's result.

    Sums of tokens saturate at 2³¹ − 1, above every sum of quotas.
    """
    n_logical, ep_size = count.shape
    source = jnp.arange(ep_size, dtype=jnp.int32)
    node = source // node_size
    number, here = jnp.arange(ep_size // node_size, dtype=jnp.int32), rank // node_size
    own = jnp.minimum(count, quota)
    left, room = count - own, quota - own
    in_nodes = (n_logical, ep_size // node_size, node_size)

    # One line per node: the places of the quotas, and of this source's tokens in its own node.
    place = jnp.cumsum(room.reshape(in_nodes), axis=2, dtype=jnp.int32).reshape(room.shape)
    demand = room.reshape(in_nodes).sum(axis=2, dtype=jnp.int32)
    supply, _ = exact_sum(left.reshape(in_nodes), axis=2)
    begin, _ = exact_sum(jnp.where((node == here) & (source < rank), left, 0), axis=1)
    end = capped_add(begin, left[:, rank])
    near = overlap(begin, end, place - room, place)

    # One line over all nodes, of the tokens and quotas beyond the ends of their nodes' lines.
    spare = jnp.maximum(demand - supply, 0)
    excess = jnp.maximum(supply - demand, 0)
    ahead, _ = exact_sum(jnp.where(number < here, excess, 0), axis=1)
    line = demand[:, here]
    beyond = jnp.maximum(end - jnp.maximum(begin, line), 0)
    begin = capped_add(ahead, jnp.maximum(begin - line, 0))
    first = (jnp.cumsum(spare, axis=1, dtype=jnp.int32) - spare)[:, node]
    taken = supply[:, node]
    far = overlap(
        begin,
        capped_add(begin, beyond),
        first + jnp.maximum(place - room - taken, 0),
        first + jnp.maximum(place - taken, 0),
    )
    return jnp.where(source == rank, own, jnp.where(node == here, near, far))


def overlap(
    begin: Int32[Array, " n_logical"],
    end: Int32[Array, " n_logical"],
    first: Int32[Array, "n_logical ep_size"],
    last: Int32[Array, "n_logical ep_size"],
) -> Int32[Array, "n_logical ep_size"]:
    """Length of the intersection of [begin, end) and [first, last)."""
    shared = jnp.minimum(end[:, None], last) - jnp.maximum(begin[:, None], first)
    return jnp.maximum(shared, 0)


def is_slot(slot: Int32[Array, "..."], n_physical: int) -> Bool[Array, "..."]:
    """Whether `slot` is a slot rather than padding."""
    return (slot >= 0) & (slot < n_physical)


def tokens_before(
    counts: Int32[Array, "n_sources n_logical"],
    home: Int32[Array, " n_logical"],
    replica: Int32[Array, " n_logical"],
    rank: Int32[Array, ""],
) -> Int32[Array, " n_logical"]:
    """Tokens of each expert on the source ranks that come before `rank`.

    The order of sources keeps tokens local: the expert's home rank first, then the other ranks in
    order, the replica's rank last. Sums saturate at 2³¹ − 1, above every quota.
    """
    source = jnp.arange(counts.shape[0])[:, None]

    def place(source):
        return jnp.where(source == home, -1, jnp.where(source == replica, len(counts), source))

    ahead, _ = exact_sum(jnp.where(place(source) < place(rank), counts, 0), axis=0)
    return ahead


def proportional_share(
    count: Int32[Array, "*n"],
    stay: Int32[Array, "*n"],
    load: Int32[Array, "*n"],
    rank: Int32[Array, ""],
    ep_size: int,
) -> Int32[Array, "*n"]:
    """How many of `count` tokens stay at home: ⌊(count · stay + offset) / load⌋, exactly.

    The offset, load · (2·rank + 1) / (2·ep_size), spreads the rounding over the ranks: ranks with
    equal counts together miss the quota by at most one token.
    """
    load = jnp.maximum(load, 0)
    twice = 2 * ep_size
    odd = 2 * rank + 1
    offset = (load // twice * odd + load % twice * odd // twice).astype(jnp.uint32)
    load, stay = load.astype(jnp.uint32), stay.astype(jnp.uint32)

    # Binary long division; every value stays below 2 · load, so 32 bits suffice.
    def digit(i, state):
        quotient, rest = state
        bit = (count >> (30 - i)) & 1
        rest = 2 * rest
        carry = rest >= load
        rest = rest - jnp.where(carry, load, 0)
        quotient = 2 * quotient + carry
        rest = rest + jnp.where(bit == 1, stay, 0)
        carry = rest >= load
        return quotient + carry, rest - jnp.where(carry, load, 0)

    zero = count * 0
    quotient, rest = lax.fori_loop(0, 31, digit, (zero, zero.astype(jnp.uint32) + 0 * load))
    quotient = quotient + (rest + offset >= load)
    # An expert with no estimated load has no share: its tokens stay at home.
    return jnp.where(load == 0, count, quotient).astype(jnp.int32)


def ordinals(expert: Int32[Array, " tokens"]) -> Int32[Array, " tokens"]:
    """The number of earlier tokens with the same expert, for every token."""
    order = jnp.argsort(expert, stable=True)
    ranked = expert[order]
    place = jnp.arange(expert.size, dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(1, bool), ranked[1:] != ranked[:-1]])[: expert.size]
    first = lax.cummax(jnp.where(is_first, place, 0))
    return jnp.zeros_like(place).at[order].set(place - first)
