"""Copies chosen for the batch at hand: which experts fill the slots that are no expert's home.

All arithmetic is int32 in a fixed order, so that every rank chooses the same copies.

**One attempt**, for a target T: no rank shall have more than T tokens. At first all tokens are on
their experts' homes. As long as a rank has more than T, one step is made:

1. The busiest rank r; of equals, the first.
2. Of its experts the one with the most tokens left there; of equals, that of the first slot.
3. The emptiest rank q among those with a free slot; of equals, the first.
4. min(load of r − T, tokens left of the expert on r, T − load of q) tokens go from r to q, and the
   expert takes q's first free slot.

The attempt fails if in a step no rank below T has a free slot, or if r has sent `fan_out` copies
already. A step ends r's excess, the expert's tokens on r, or q's deficit. So r never sends the same
expert to q twice, and no rank that receives ever sends; there are as many steps as copies.

**Targets.** With m = ⌈all tokens / ranks⌉, M the largest load without copies, s = M − m, and
f(x, i) = ⌊x · i² / 2¹⁰⌋, targets are T_i = m + f(f(s, i), i) for i = 1 … 32: dense near the mean.
The last is M, which needs no copies, so one attempt always succeeds. They do not depend on one
another and may run side by side.

**Choice.** Let T* be the least target whose attempt succeeds. Of the successful attempts with a
target of at most T* + ⌊m / 2⁹⌋ the one with the fewest copies is taken; of equals, the first: the
transfer of an expert's weights costs more than the last five hundredth of balance gives back.

The tokens of the attempt are a legal split that loads no rank above T; they are not returned, since
`solve` finds the best one over the chosen copies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32

from lplb_jax.reference.sums import ceil_mean, exact_sum

N_TARGETS = 32
# What fewer copies may cost: the mean rank load, shifted by so many bits.
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
    """phy2log, log2phy and logcnt of the placement with copies for these loads.

    Every home stays in its slot, and all other slots are filled anew, whatever they hold; −1 where
    there is no copy. An expert's home is the slot that log2phy names first; where that does not
    hold the expert, it has no slot in the result, and `solve` finds a bad placement. Of log2phy the
    rows are the home, then the copies in the order of their ranks, then −1, in `width` =
    min(ep_size, 1 + slots that are no home, 1 + fan_out) places.

    `loads` has a row per source rank (or one in all); what a row has after n_logical places does
    not matter. Negative loads count as 0. Where all loads together pass 2³¹ − 1 there are no copies
    (with fewer, no sum passes it: neither here nor in the solver, whatever was copied where).
    """
    n_logical, n_physical = log2phy.shape[0], phy2log.size
    total, too_large = exact_sum(jnp.maximum(loads[:, :n_logical], 0), axis=0)
    _, sum_too_large = exact_sum(total, axis=0)
    total = jnp.where(too_large.any() | sum_too_large, 0, total)

    number = jnp.arange(n_physical, dtype=jnp.int32)
    expert = jnp.where((phy2log >= 0) & (phy2log < n_logical), phy2log, n_logical)
    homes = log2phy[:, 0].at[expert].get(mode="fill", fill_value=-1)
    is_home = homes == number
    tokens = jnp.where(is_home, total.at[expert].get(mode="fill", fill_value=0), 0)
    # From the loads, too: under shard_map both must vary over the same axes.
    slots = jnp.where(is_home, expert, -1) + 0 * tokens

    by_rank = (ep_size, n_physical // ep_size)
    chosen = choose(tokens.reshape(by_rank), slots.reshape(by_rank), fan_out)
    width = min(ep_size, 1 + n_physical - n_logical, 1 + fan_out)
    return chosen.reshape(-1), *tables(chosen, log2phy[:, 0], width)


def choose(
    tokens: Int32[Array, "ep_size slots_per_rank"],
    slots: Int32[Array, "ep_size slots_per_rank"],
    fan_out: int,
) -> Int32[Array, "ep_size slots_per_rank"]:
    """The experts of all slots, from those of the homes alone and the tokens there."""
    load = tokens.sum(axis=1, dtype=jnp.int32)
    mean = ceil_mean(load, jnp.ones(load.shape, bool))
    nth = jnp.arange(1, N_TARGETS + 1, dtype=jnp.int32)

    def part(of: Int32[Array, ""] | Int32[Array, " n"]) -> Int32[Array, " n"]:
        """⌊of · nth² / 2¹⁰⌋, which fits: nth² is at most 2¹⁰."""
        return (of >> 10) * nth**2 + ((of & 1023) * nth**2 >> 10)

    target = mean + part(part(load.max() - mean))
    state = jax.vmap(lambda target: attempt(target, tokens, slots, fan_out))(target)

    least = jnp.where(state.failed, load.max(), target).min()
    good_enough = ~state.failed & (target - least <= mean >> WORTH)
    n_copies = (state.slots >= 0).sum(axis=(1, 2), dtype=jnp.int32)
    best = jnp.where(good_enough, n_copies, slots.size + 1).argmin()
    return state.slots[best]


class State(NamedTuple):
    """Of one attempt."""

    load: Int32[Array, " ep_size"]
    left: Int32[Array, "ep_size slots_per_rank"]  # tokens that are still on the expert's home
    slots: Int32[Array, "ep_size slots_per_rank"]  # −1 where free
    sent: Int32[Array, " ep_size"]  # copies of a rank's experts
    failed: Bool[Array, ""]


def attempt(
    target: Int32[Array, ""],
    tokens: Int32[Array, "ep_size slots_per_rank"],
    slots: Int32[Array, "ep_size slots_per_rank"],
    fan_out: int,
) -> State:
    """Copies with which no rank has more than `target` tokens, or as many as there could be."""

    def step(state: State) -> State:
        load, left, slots, sent, _ = state
        rank = load.argmax()
        slot = left[rank].argmax()
        room = jnp.where((slots < 0).any(axis=1), jnp.maximum(target - load, 0), 0)
        to = room.argmax()
        failed = (room[to] == 0) | (sent[rank] >= fan_out)
        moved = jnp.minimum(jnp.minimum(load[rank] - target, left[rank, slot]), room[to])
        moved = jnp.where(failed, 0, moved)
        free = (slots[to] < 0).argmax()
        return State(
            load.at[rank].add(-moved).at[to].add(moved),
            left.at[rank, slot].add(-moved),
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
    """log2phy and logcnt of a table in which no expert is twice on a rank."""
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
