"""From quotas to tokens: which slot serves every token of one source rank."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, Integer

from lplb_jax.reference.loads import expert_or_none


def assign(
    indices: Integer[Array, " tokens"],
    counts: Int32[Array, "n_sources row"],
    quota: Int32[Array, " n_physical"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    rank: Int32[Array, ""],
    *,
    ep_size: int,
    proportional: int,
    positions: int,
) -> tuple[Int32[Array, " tokens"], Int32[Array, " tokens_or_0"], Int32[Array, " physical_or_0"]]:
    """Physical slot of every token, −1 where it names no expert.

    If `positions`, also every token's place in its slot's list of this source's tokens, in their
    order, and the lengths of the lists; else two empty arrays.

    `counts` are the tokens per expert of all source ranks, of which `indices` is number `rank`;
    or, with one row, of `indices` alone. With one row the tokens are the whole batch, or, if
    `proportional`, this source's part of a batch whose loads were only estimated. A slot that
    log2phy gives an expert counts only if phy2log has that expert there: where a placement
    contradicts itself, tokens may get no slot, but never that of another expert.
    """
    n_logical = log2phy.shape[0]
    counts = jnp.maximum(counts[:, :n_logical], 0)
    (home, has_home), (replica, has_replica) = (own_slot(phy2log, log2phy[:, k]) for k in (0, 1))
    # The solvers' quotas are never negative, nor is a sum of two above int32; others may be.
    quota = jnp.maximum(quota, 0)
    stay, away = quota[jnp.where(has_home, home, 0)], quota[jnp.where(has_replica, replica, 0)]
    if proportional:
        load = stay + jnp.minimum(away, jnp.iinfo(jnp.int32).max - stay)
        keep = proportional_share(counts[0], stay, load, rank, ep_size)
    elif counts.shape[0] == 1:
        keep = stay
    else:
        slots_per_rank = quota.size // ep_size
        before = tokens_before(counts, home // slots_per_rank, replica // slots_per_rank, rank)
        keep = jnp.maximum(stay - before, 0)
    # An expert with one slot has nowhere else to go.
    keep = jnp.where(has_home & has_replica, keep, jnp.iinfo(jnp.int32).max)

    expert = expert_or_none(indices, n_logical)
    ordinal = ordinals(expert)
    stays = ordinal < keep[expert]
    slot = jnp.where(stays, home[expert], replica[expert])
    known = (expert >= 0) & (slot >= 0)
    slot = jnp.where(known, slot, -1)
    if not positions:
        return slot, slot[:0], quota[:0]
    position = jnp.where(known, jnp.where(stays, ordinal, ordinal - keep[expert]), -1)
    bins = jnp.where(known, slot, quota.size)
    return slot, position, jnp.zeros_like(quota).at[bins].add(1, mode="drop")


def own_slot(
    phy2log: Int32[Array, " n_physical"], slot: Int32[Array, " n_logical"]
) -> tuple[Int32[Array, " n_logical"], Bool[Array, " n_logical"]]:
    """Every expert's slot, −1 where log2phy names none that holds the expert; and where it does."""
    expert = jnp.arange(slot.size, dtype=jnp.int32)
    known = (slot >= 0) & (phy2log.at[slot].get(mode="fill", fill_value=-1) == expert)
    return jnp.where(known, slot, -1), known


def tokens_before(
    counts: Int32[Array, "n_sources n_logical"],
    home: Int32[Array, " n_logical"],
    replica: Int32[Array, " n_logical"],
    rank: Int32[Array, ""],
) -> Int32[Array, " n_logical"]:
    """Tokens of each expert on the source ranks that come before `rank`.

    The order of the sources keeps tokens where they are: the expert's home rank first, then the
    other ranks in order, the replica's rank last. Sums stay at 2³¹ − 1, above every quota.
    """
    source = jnp.arange(counts.shape[0])[:, None]

    def place(source):
        return jnp.where(source == home, -1, jnp.where(source == replica, len(counts), source))

    ahead = jnp.where(place(source) < place(rank), counts, 0)
    high = (ahead >> 16).sum(axis=0, dtype=jnp.int32)
    low = (ahead & 0xFFFF).sum(axis=0, dtype=jnp.int32)
    too_large = high + (low >> 16) >= 1 << 15
    return jnp.where(too_large, jnp.iinfo(jnp.int32).max, ahead.sum(axis=0, dtype=jnp.int32))


def proportional_share(
    count: Int32[Array, " n_logical"],
    stay: Int32[Array, " n_logical"],
    load: Int32[Array, " n_logical"],
    rank: Int32[Array, ""],
    ep_size: int,
) -> Int32[Array, " n_logical"]:
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
    # An expert without an estimated load has no share to keep to: its tokens stay at home.
    return jnp.where(load == 0, count, quotient).astype(jnp.int32)


def ordinals(expert: Int32[Array, " tokens"]) -> Int32[Array, " tokens"]:
    """For every token, how many earlier tokens name the same expert."""
    order = jnp.argsort(expert, stable=True)
    ranked = expert[order]
    place = jnp.arange(expert.size, dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(1, bool), ranked[1:] != ranked[:-1]])[: expert.size]
    first = lax.cummax(jnp.where(is_first, place, 0))
    return jnp.zeros_like(place).at[order].set(place - first)
