"""Copies chosen for the current batch: which experts fill the slots that are no expert's home.

All arithmetic is int32 in a fixed order, so that every rank chooses the same copies.

**One attempt** at a target T, the most tokens a rank may have. At first all tokens are on their
experts' homes. While a rank has more than T, a step chooses

1. the busiest rank r; among equals, the first;
2. its expert with the most tokens left there; among equals, the one in the first slot;
3. the emptiest rank q that has a free slot; among equals, the first.
4. Then min(load of r − T, tokens of the expert left on r, T − load of q) tokens go from r to q, and
   the expert takes q's first free slot.

The attempt fails if no rank below T has a free slot, if r has already sent `fan_out` copies, or if
there are n_physical − n_logical copies (then all slots are full, unless an expert has no home). A
step exhausts r's excess, the expert's tokens on r, or q's deficit. So r never sends the same expert
to q twice, and no receiving rank ever sends; there are as many steps as copies.

**Targets.** With m = ⌈all tokens / ranks⌉, M the largest load without copies, s = M − m, and
f(x, i) = ⌊x · i² / 2¹⁰⌋, targets are T_i = m + f(f(s, i), i) for i = 1 … 32: dense near the mean.
The last is M, which needs no copies, so one attempt always succeeds. Attempts are independent and
may run in parallel.

**Choice.** Let T* be the least target whose attempt succeeds. Among the successful attempts with a
target of at most T* + ⌊m / 2⁹⌋, the one with the fewest copies is chosen; among equals, the first.
Transferring an expert's weights costs more than the last five-hundredth of balance gains.

The tokens of the attempt are a feasible split with no rank above T. `rebalance` starts from it to
find the best split over the chosen copies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32

from lplb_jax.reference.sums import ceil_mean, exact_sum

N_TARGETS = 32
# The load that saving copies may cost: the mean rank load, shifted right by this many bits.
WORTH = 9


def place_copies(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    *,
    ep_size: int,
    fan_out: int,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, "n_logical width"],
    Int32[Array, " n_logical"],
]:
    """phy2log, log2phy and logcnt of the placement with copies for these loads: see `place`."""
    return place(loads, phy2log, log2phy, ep_size=ep_size, fan_out=fan_out)[:3]


def place(
    loads: Int32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    *,
    ep_size: int,
    fan_out: int,
) -> tuple[
    Int32[Array, " n_physical"],
    Int32[Array, "n_logical width"],
    Int32[Array, " n_logical"],
    Int32[Array, " n_physical"],
]:
    """phy2log, log2phy and logcnt of the placement with copies for these loads; a feasible split.

    Every home stays in its slot; all other slots are refilled, whatever they held, with −1 for no
    copy. An expert's home is the first slot in its row of log2phy. If that slot does not hold the
    expert, the expert has no slot in the result, and `solve` reports a bad placement. Rows of
    log2phy are the home, then the copies in rank order, then −1, `width` = min(ep_size, 1 + slots
    that are no home, 1 + fan_out) entries in all.

    `loads` has a row per source rank, or a single row; entries past n_logical are ignored. Negative
    loads count as 0. If the loads of all experts with a home exceed 2³¹ − 1 in total, there are no
    copies, and all loads count as 0; otherwise no sum overflows, neither here nor in the solver,
    whatever the copies.
    """
    n_logical, n_physical = log2phy.shape[0], phy2log.size
    total, too_large = exact_sum(jnp.maximum(loads[:, :n_logical], 0), axis=0)

    number = jnp.arange(n_physical, dtype=jnp.int32)
    expert = jnp.where((phy2log >= 0) & (phy2log < n_logical), phy2log, n_logical)
    homes = log2phy[:, 0].at[expert].get(mode="fill", fill_value=-1)
    is_home = homes == number
    tokens = jnp.where(is_home, total.at[expert].get(mode="fill", fill_value=0), 0)
    too_many = (is_home & too_large.at[expert].get(mode="fill", fill_value=False)).any()
    too_many |= exact_sum(tokens, axis=0)[1]
    tokens = jnp.where(too_many, 0, tokens)
    # Derived from the loads, too: under shard_map both must vary over the same axes.
    slots = jnp.where(is_home, expert, -1) + 0 * tokens

    by_rank = (ep_size, n_physical // ep_size)
    most = n_physical - n_logical
    chosen, split = choose(tokens.reshape(by_rank), slots.reshape(by_rank), fan_out, most)
    width = min(ep_size, 1 + n_physical - n_logical, 1 + fan_out)
    return chosen.reshape(-1), *tables(chosen, log2phy[:, 0], width), split.reshape(-1)


def choose(
    tokens: Int32[Array, "ep_size slots_per_rank"],
    slots: Int32[Array, "ep_size slots_per_rank"],
    fan_out: int,
    most: int,
) -> tuple[Int32[Array, "ep_size slots_per_rank"], Int32[Array, "ep_size slots_per_rank"]]:
    """The experts and tokens of all slots, given those of the homes, with at most `most` copies."""
    load = tokens.sum(axis=1, dtype=jnp.int32)
    mean = ceil_mean(load, jnp.ones(load.shape, bool))
    nth = jnp.arange(1, N_TARGETS + 1, dtype=jnp.int32)

    def part(of: Int32[Array, ""] | Int32[Array, " n"]) -> Int32[Array, " n"]:
        """⌊of · nth² / 2¹⁰⌋, which fits: nth² is at most 2¹⁰."""
        return (of >> 10) * nth**2 + ((of & 1023) * nth**2 >> 10)

    target = mean + part(part(load.max() - mean))
    state = jax.vmap(lambda target: attempt(target, tokens, slots, fan_out, most))(target)

    least = jnp.where(state.failed, load.max(), target).min()
    good_enough = ~state.failed & (target - least <= mean >> WORTH)
    n_copies = (state.slots >= 0).sum(axis=(1, 2), dtype=jnp.int32)
    best = jnp.where(good_enough, n_copies, slots.size + 1).argmin()
    return state.slots[best], state.tokens[best]


class State(NamedTuple):
    """The state of one attempt."""

    load: Int32[Array, " ep_size"]
    tokens: Int32[Array, "ep_size slots_per_rank"]  # on homes: those that are left
    slots: Int32[Array, "ep_size slots_per_rank"]  # −1 if free
    sent: Int32[Array, " ep_size"]  # copies of a rank's experts
    failed: Bool[Array, ""]


def attempt(
    target: Int32[Array, ""],
    tokens: Int32[Array, "ep_size slots_per_rank"],
    slots: Int32[Array, "ep_size slots_per_rank"],
    fan_out: int,
    most: int,
) -> State:
    """Copies with which no rank exceeds `target` tokens; if it fails, those found until then."""

    def step(state: State) -> State:
        load, tokens, slots, sent, _ = state
        rank = load.argmax()
        slot = tokens[rank].argmax()
        room = jnp.where((slots < 0).any(axis=1), jnp.maximum(target - load, 0), 0)
        to = room.argmax()
        failed = (room[to] == 0) | (sent[rank] >= fan_out) | (sent.sum(dtype=jnp.int32) >= most)
        moved = jnp.minimum(jnp.minimum(load[rank] - target, tokens[rank, slot]), room[to])
        moved = jnp.where(failed, 0, moved)
        free = (slots[to] < 0).argmax()
        return State(
            load.at[rank].add(-moved).at[to].add(moved),
            # Where it failed, the slot may be a home.
            tokens.at[rank, slot].add(-moved).at[to, free].add(moved),
            jnp.where(failed, slots, slots.at[to, free].set(slots[rank, slot])),
            sent.at[rank].add(1),
            failed,
        )

    load = tokens.sum(axis=1, dtype=jnp.int32)
    start = State(load, tokens, slots, 0 * load, target < 0)
    return lax.while_loop(lambda state: (state.load > target).any() & ~state.failed, step, start)


def tables(
    slots: Int32[Array, "ep_size slots_per_rank"],
    homes: Int32[Array, " n_logical"],
    width: int,
) -> tuple[Int32[Array, "n_logical width"], Int32[Array, " n_logical"]]:
    """log2phy and logcnt of a table in which no rank has an expert twice."""
    n_logical, n_ranks, n_slots = homes.size, len(slots), slots.size
    expert = jnp.where(slots >= 0, slots, n_logical)
    rank = jnp.arange(n_ranks, dtype=jnp.int32)[:, None]
    number = jnp.arange(n_slots, dtype=jnp.int32).reshape(slots.shape)
    nowhere = jnp.full((n_logical, n_ranks), n_slots, jnp.int32)
    slot = nowhere.at[expert, rank].set(number, mode="drop")
    hosts = slot < n_slots
    is_home = slot == homes[:, None]
    nth = jnp.cumsum(hosts & ~is_home, axis=1, dtype=jnp.int32)
    place = jnp.where(hosts, jnp.where(is_home, 0, nth), width)
    empty = jnp.full((n_logical, width), -1, jnp.int32)
    row = jnp.arange(n_logical, dtype=jnp.int32)[:, None]
    return empty.at[row, place].set(slot, mode="drop"), hosts.sum(axis=1, dtype=jnp.int32)
