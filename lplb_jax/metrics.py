"""Pure functions that measure how well a batch is balanced. All work under `jit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lplb_jax import _cost, _native, _relays
from lplb_jax.placement import Placement, check_nodes
from lplb_jax.solver import Split


def rank_loads(quota: ArrayLike, ep_size: int) -> jax.Array:
    """Tokens per rank.

    Args:
      quota: int32 `[..., n_physical]`, tokens per physical slot (a `Split.quota`, or counted
        tokens).
      ep_size: ranks; slots are numbered rank by rank.

    Returns:
      int32 `[..., ep_size]`.

    Raises:
      ValueError: n_physical is not a multiple of `ep_size`.

    >>> rank_loads(jnp.array([1, 2, 3, 4]), 2).tolist()
    [3, 7]
    """
    quota = _native.whole(quota)
    if quota.ndim < 1 or quota.shape[-1] % ep_size:
        raise ValueError(
            f"quota: expected [..., n_physical], a multiple of ep_size = {ep_size}, got "
            f"{list(quota.shape)}"
        )
    *layers, n_physical = quota.shape
    by_rank = quota.reshape(*layers, ep_size, n_physical // ep_size)
    return by_rank.sum(axis=-1, dtype=jnp.int32)


def home_quota(loads: ArrayLike, placement: Placement) -> jax.Array:
    """The quotas without replicas: every token goes to its expert's home, its first slot.

    Args:
      loads: int32 `[..., n_logical]`, tokens per expert.
      placement: where the experts are. Stacked, its layers are those of the first axis of loads.

    Returns:
      int32 `[..., n_physical]`.

    Raises:
      ValueError: the shape of loads does not match the placement's experts or layers.

    >>> from lplb_jax import place_experts, topologies
    >>> placement = place_experts(
    ...     None, topologies.ring(2), n_logical=2, ep_size=2, redundants_per_rank=1
    ... )
    >>> home_quota(jnp.array([6, 2]), placement).tolist()
    [6, 0, 2, 0]
    """
    return _by_layer(_home_quota, "loads", loads, placement, placement.n_logical)


def _home_quota(loads: jax.Array, placement: Placement) -> jax.Array:
    expert, slot = placement.phy2log, jnp.arange(placement.n_physical, dtype=jnp.int32)
    at_home = (expert >= 0) & (placement.log2phy[:, 0][expert] == slot)
    return loads[expert] * at_home.astype(loads.dtype)


def even_quota(loads: ArrayLike, placement: Placement) -> jax.Array:
    """The quotas if every expert's tokens are split evenly over its slots, as EPLB does.

    Args:
      loads: int32 `[..., n_logical]`, tokens per expert.
      placement: where the experts are. Stacked, its layers are those of the first axis of loads.

    Returns:
      int32 `[..., n_physical]`; earlier slots get the remainder, one token each.

    Raises:
      ValueError: the shape of loads does not match the placement's experts or layers.

    >>> from lplb_jax import place_experts, topologies
    >>> placement = place_experts(
    ...     None, topologies.ring(2), n_logical=2, ep_size=2, redundants_per_rank=1
    ... )
    >>> even_quota(jnp.array([6, 3]), placement).tolist()
    [3, 1, 2, 3]
    """
    return _by_layer(_even_quota, "loads", loads, placement, placement.n_logical)


def _even_quota(loads: jax.Array, placement: Placement) -> jax.Array:
    # Counted here: a traced logcnt may be wrong, and tokens would be lost.
    log2phy = placement.log2phy
    named = (log2phy >= 0) & (log2phy < placement.n_physical)
    nth = jnp.cumsum(named, axis=1, dtype=loads.dtype)  # from 1
    expert, slot = placement.phy2log, jnp.arange(placement.n_physical, dtype=jnp.int32)
    is_slot = (log2phy[expert] == slot[:, None]) & (expert >= 0)[:, None]
    nth_of_slot = (nth[expert] * is_slot.astype(loads.dtype)).sum(axis=1, dtype=loads.dtype)
    load, n_slots = loads[expert], jnp.maximum(nth[:, -1][expert], 1)
    odd = nth_of_slot <= load % n_slots
    share = load // n_slots + odd.astype(loads.dtype)
    return share * (nth_of_slot > 0).astype(loads.dtype)


def expert_loads(slot_loads: ArrayLike, placement: Placement) -> jax.Array:
    """Tokens per expert from tokens per slot, such as `moe.Traffic.slot_loads`.

    Args:
      slot_loads: int32 `[..., n_physical]`, tokens per physical slot.
      placement: where the experts are. Stacked, its layers are those of the first axis of
        slot_loads.

    Returns:
      int32 `[..., n_logical]`, for `place_experts` and `LoadHistory.update`.

    Raises:
      ValueError: the shape of slot_loads does not match the placement's slots or layers.

    >>> from lplb_jax import Placement
    >>> placement = Placement.from_phy2log([[0, 1, 2], [2, 3, -1]], ep_size=2)
    >>> expert_loads(jnp.array([5, 1, 4, 3, 2, 0]), placement).tolist()
    [5, 1, 7, 2]
    """
    return _by_layer(_expert_loads, "slot_loads", slot_loads, placement, placement.n_physical)


def _expert_loads(slot_loads: jax.Array, placement: Placement) -> jax.Array:
    log2phy = placement.log2phy
    served = slot_loads[log2phy] * (log2phy >= 0).astype(slot_loads.dtype)
    return served.sum(axis=1, dtype=slot_loads.dtype)


def imbalance(loads_of_ranks: ArrayLike) -> jax.Array:
    """Largest load over mean load: 1.0 is perfect balance; 1.0 if there is no load.

    Args:
      loads_of_ranks: `[..., n_ranks]`, tokens per rank.

    Returns:
      float32 `[...]`, at least 1.

    >>> float(imbalance(jnp.array([3, 1])))
    1.5
    """
    return _imbalance(jnp.asarray(loads_of_ranks))


@jax.jit
def _imbalance(loads: jax.Array) -> jax.Array:
    loads = loads.astype(jnp.float32)
    mean = loads.mean(axis=-1)
    return jnp.where(mean > 0, loads.max(axis=-1) / jnp.where(mean > 0, mean, 1), 1.0)


def gain(loads_before: ArrayLike, loads_after: ArrayLike) -> jax.Array:
    """The factor by which the busiest rank's work shrank.

    Args:
      loads_before: `[..., n_ranks]`, tokens per rank.
      loads_after: the same after balancing.

    Returns:
      float32 `[...]`: largest load before over largest load after; 1.0 if there is no load.

    >>> float(gain(jnp.array([6, 2]), jnp.array([4, 4])))
    1.5
    """
    return _gain(jnp.asarray(loads_before), jnp.asarray(loads_after))


@jax.jit
def _gain(before: jax.Array, after: jax.Array) -> jax.Array:
    before = before.astype(jnp.float32).max(axis=-1)
    after = after.astype(jnp.float32).max(axis=-1)
    return jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1.0)


def gap(split: Split) -> jax.Array:
    """Relative distance to the proven bound: 0.0 is proven optimal.

    Args:
      split: result of `solve` or `rebalance`.

    Returns:
      float32 `[n_groups]`: (max_load − lower_bound) / max(lower_bound, 1).

    >>> import lplb_jax
    >>> split = lplb_jax.solve(jnp.array([9, 1], jnp.int32), lplb_jax.topologies.ring(2))
    >>> gap(split).tolist()
    [0.0]
    """
    return _gap(jnp.asarray(split.max_load), jnp.asarray(split.lower_bound))


@jax.jit
def _gap(max_load: jax.Array, lower_bound: jax.Array) -> jax.Array:
    excess = (max_load - lower_bound).astype(jnp.float32)
    return excess / jnp.maximum(lower_bound, 1).astype(jnp.float32)


def mean_gap(split: Split, ep_size: int) -> jax.Array:
    """Relative distance to perfect balance: the loss due to where the copies are.

    No placement brings the busiest rank below ⌈all tokens / ranks⌉. `gap` measures the solver on
    the given copies; this measures the copies themselves: too few slots, a small `fan_out` (see
    `place_copies`), or a placement made for other loads.

    Args:
      split: result of `solve` or `rebalance`, for loads in tokens.
      ep_size: ranks.

    Returns:
      float32 scalar: (the largest rank load − ⌈all tokens / ep_size⌉) / max(the latter, 1).

    Raises:
      ValueError: the number of quotas is not a multiple of `ep_size`.

    >>> import lplb_jax
    >>> empty = lplb_jax.Placement.from_phy2log([[0, -1], [1, -1]], ep_size=2)
    >>> loads = jnp.array([9, 3], jnp.int32)
    >>> float(mean_gap(lplb_jax.solve(loads, placement=empty), 2))
    0.5
    >>> chosen = lplb_jax.place_copies(loads, empty)
    >>> float(mean_gap(lplb_jax.solve(loads, placement=chosen), 2))
    0.0
    """
    loads = rank_loads(split.quota, ep_size)
    # Quotients and remainders separately: the sum of the loads may exceed 2³¹.
    rest = (loads % ep_size).sum(axis=-1, dtype=loads.dtype)
    mean = (loads // ep_size).sum(axis=-1, dtype=loads.dtype) + -(-rest // ep_size)
    excess = (loads.max(axis=-1) - mean).astype(jnp.float32)
    return excess / jnp.maximum(mean, 1).astype(jnp.float32)


def tokens_moved(quota: ArrayLike, placement: Placement) -> jax.Array:
    """Tokens that a replica serves instead of the expert's home, its first slot.

    Args:
      quota: int32 `[..., n_physical]`, tokens per physical slot.
      placement: where the experts are. Stacked, its layers are those of the first axis of quota.

    Returns:
      int32 `[...]`.

    Raises:
      ValueError: the shape of quota does not match the placement's slots or layers.

    >>> from lplb_jax import place_experts, topologies
    >>> placement = place_experts(
    ...     None, topologies.ring(2), n_logical=2, ep_size=2, redundants_per_rank=1
    ... )
    >>> int(tokens_moved(jnp.array([5, 0, 5, 2]), placement))
    2
    """
    return _by_layer(_tokens_moved, "quota", quota, placement, placement.n_physical)


def _tokens_moved(quota: jax.Array, placement: Placement) -> jax.Array:
    at_home = quota[placement.log2phy[:, 0]]
    return quota.sum(dtype=jnp.int32) - at_home.sum(dtype=jnp.int32)


class CopyTraffic(NamedTuple):
    """Copies of experts whose weights travel for one batch, counted by rank, and what they save.

    Multiplied by the bytes of an expert (in floats: int32 may overflow), the counts are the traffic
    of a rank's links. The copies' gradients take the same links back.

    Attributes:
      sent: int32 `[..., ep_size]`, copies that a rank sends, including those that it relays.
      received: int32 `[..., ep_size]`, copies that a rank receives.
      sent_abroad: int32 `[..., ep_size]`, copies sent to ranks of other nodes; part of `sent`.
      received_abroad: int32 `[..., ep_size]`, copies received from other nodes; part of `received`.
      rows_saved: int32 `[...]`, by how many rows the copies shrink the busiest rank's load.
    """

    sent: jax.Array
    received: jax.Array
    sent_abroad: jax.Array
    received_abroad: jax.Array
    rows_saved: jax.Array


def copy_traffic(
    quota: ArrayLike, placement: Placement, *, n_nodes: int | None = None
) -> CopyTraffic:
    """Counts the copies that `moe.moe_layer` moves for a batch, before any of them moves.

    Without a topology, as with copies chosen for the batch, these are the copies that serve tokens.
    Ranks relay them, and each other node gets a copy once (transports "ragged" and "peer"; between
    processes "peer" sends all from their homes, and "padded" sends the room of all ranks to each,
    filled or not). Along a topology, all copies move, directly from their homes.

    Args:
      quota: int32 `[..., n_physical]`, tokens per physical slot: a `Split.quota`, or counted.
      placement: where the experts are. Stacked, its layers are those of the first axis of quota.
      n_nodes: nodes with `ep_size / n_nodes` consecutive ranks each; None for the placement's.

    Returns:
      A `CopyTraffic`; `copy_times` converts it to seconds.

    Raises:
      ValueError: the shape of quota does not match the placement's slots or layers, or n_nodes does
        not divide ep_size.

    >>> import lplb_jax
    >>> empty = lplb_jax.Placement.from_phy2log([[0, 1, -1], [2, 3, -1]], ep_size=2)
    >>> ids = jnp.array([0] * 9 + [1, 2, 3])
    >>> _, split, chosen = lplb_jax.rebalance(ids, None, placement=empty, copies="batch")
    >>> copies = copy_traffic(split.quota, chosen)
    >>> copies.sent.tolist(), copies.received.tolist(), int(copies.rows_saved)
    ([1, 0], [0, 1], 4)
    """
    if n_nodes is None:
        n_nodes = placement.n_nodes
    check_nodes(placement.ep_size, n_nodes)
    return _by_layer(_copy_traffic(n_nodes), "quota", quota, placement, placement.n_physical)


@functools.cache
def _copy_traffic(n_nodes: int) -> Callable[[jax.Array, Placement], CopyTraffic]:
    """The same function for the same number of nodes, so that JAX compiles it once."""

    def counted(quota: jax.Array, placement: Placement) -> CopyTraffic:
        ep_size, n_slots = placement.ep_size, placement.n_physical // placement.ep_size
        expert, slot = placement.phy2log, jnp.arange(placement.n_physical, dtype=jnp.int32)
        rank, home = slot // n_slots, placement.log2phy[:, 0][expert]
        owner, moves = home // n_slots, (expert >= 0) & (slot != home)
        most = max(1, min(placement.log2phy.shape[1], ep_size) - 1)
        if placement.topology is not None:
            limits = _relays.direct(ep_size, placement.n_physical)
        else:
            moves &= (quota > 0) & (rank != owner)
            limits = _relays.limits(ep_size, n_nodes, most)
        turn, parent, _ = _relays.journeys(expert, rank, owner, moves, limits)
        sender = jnp.where(parent < 0, owner, rank[parent])
        moved, node_size = turn >= 0, ep_size // n_nodes
        abroad = moved & (sender // node_size != rank // node_size)
        ranks = jnp.arange(ep_size, dtype=jnp.int32)[:, None]

        def count(copies: jax.Array, at: jax.Array) -> jax.Array:
            return (copies[None] & (at[None] == ranks)).sum(axis=1, dtype=jnp.int32)

        alone = _home_quota(_expert_loads(quota, placement), placement)
        busiest = (rank_loads(tokens, ep_size).max() for tokens in (alone, quota))
        return CopyTraffic(
            count(moved, sender),
            count(moved, rank),
            count(abroad, sender),
            count(abroad, rank),
            next(busiest) - next(busiest),
        )

    return counted


class CopyTimes(NamedTuple):
    """Estimated seconds, float32 `[...]` each.

    Attributes:
      fetch: the time of the copies on the busiest link, in training with their gradients.
      saved: the time by which the copies shorten the busiest rank's GEMMs.
    """

    fetch: jax.Array
    saved: jax.Array


def copy_times(
    copies: CopyTraffic,
    *,
    parameters: float,
    bytes_per_expert: float | None = None,
    inference: bool = False,
    flops: float = _cost.FLOPS,
    link: float = _cost.LINK,
    node_link: float = _cost.NODE_LINK,
) -> CopyTimes:
    """Estimates whether copies pay off: the time of their transfer, and the time that they save.

    If `fetch` is larger than `saved`, as in small batches, the layer is faster without copies,
    unless computation hides the transfer: then only the part that it does not hide counts. The
    costs are those of `advise`, which leave out the latency of a round of transfers.

    Args:
      copies: from `copy_traffic`, or `moe.Traffic.copies`.
      parameters: of one expert; 3 · hidden · width for `moe.Experts`.
      bytes_per_expert: its weights as they travel; None for 16-bit floats.
      inference: forward only. Otherwise gradients travel back, and there are three times as many
        GEMMs.
      flops: floating-point operations per second that a rank's GEMMs reach. The defaults of all
        rates except node_link were measured on H200s.
      link: bytes per second from a rank to others of its node, and in the other direction.
      node_link: the same to other nodes.

    Returns:
      A `CopyTimes`.

    Raises:
      ValueError: a number is not finite or not positive.

    Moving one copy, with its gradient, takes as long as computing 1,358 rows, whatever the size of
    the experts:

    >>> one, none = jnp.array([1, 0]), jnp.array([0, 0])
    >>> copies = CopyTraffic(one, one[::-1], none, none, jnp.int32(1358))
    >>> times = copy_times(copies, parameters=3 * 4096 * 1536)
    >>> round(1e6 * float(times.fetch)), round(1e6 * float(times.saved))
    (280, 280)
    """
    given = {"parameters": parameters, "flops": flops, "link": link, "node_link": node_link}
    if bytes_per_expert is None:
        bytes_per_expert = 2.0 * parameters
    _cost.check_positive({**given, "bytes_per_expert": bytes_per_expert})
    sent, received, sent_abroad, received_abroad, rows = (
        jnp.asarray(leaf, jnp.float32) for leaf in copies
    )
    seconds = [
        n.max(axis=-1) * (bytes_per_expert / rate)
        for n, rate in (
            (sent - sent_abroad, link),
            (received - received_abroad, link),
            (sent_abroad, node_link),
            (received_abroad, node_link),
        )
    ]
    fetch = _cost.ways(inference) * functools.reduce(jnp.maximum, seconds)
    saved = _cost.passes(inference) * _cost.forward_seconds(rows, parameters, flops)
    return CopyTimes(fetch, saved)


def experts_fetched(old: Placement, new: Placement) -> jax.Array:
    """Experts whose weights each rank must fetch when `new` replaces `old`.

    Args:
      old: the current placement.
      new: the next one, with the same numbers of experts, ranks and layers, if stacked.

    Returns:
      int32 `[..., ep_size]`: experts with a slot on the rank in `new`, and none in `old`. An expert
      that gets slots on two more ranks counts on both.

    Raises:
      TypeError, ValueError: an argument is not a `Placement`, or the sizes differ.

    >>> from lplb_jax import Placement
    >>> old = Placement.from_phy2log([[0, 1, 2], [2, 3, 0]], ep_size=2)
    >>> new = Placement.from_phy2log([[0, 1, 3], [2, 3, -1]], ep_size=2)
    >>> experts_fetched(old, new).tolist()
    [1, 0]
    """

    return _of_both(_experts_fetched, old, new)


def _experts_fetched(old: Placement, new: Placement) -> jax.Array:
    return (_hosts(new) & ~_hosts(old)).sum(axis=0, dtype=jnp.int32)


def _hosts(placement: Placement) -> jax.Array:
    """Whether expert e has a slot on rank r, bool `[n_logical, ep_size]`."""
    by_rank = placement.phy2log.reshape(placement.ep_size, -1)
    experts = jnp.arange(placement.n_logical, dtype=jnp.int32)[:, None, None]
    return (by_rank[None] == experts).any(axis=2)


def homes_moved(old: Placement, new: Placement) -> jax.Array:
    """Experts whose home moves to another rank, and their optimizer state with it.

    Args:
      old: the current placement.
      new: the next one, with the same numbers of experts, ranks and layers, if stacked.

    Returns:
      int32 `[...]`.

    Raises:
      TypeError, ValueError: an argument is not a `Placement`, or the sizes differ.

    >>> from lplb_jax import Placement
    >>> old = Placement.from_phy2log([[0, 1], [2, 3]], ep_size=2)
    >>> new = Placement.from_phy2log([[0, 3], [2, 1]], ep_size=2)
    >>> int(homes_moved(old, new))
    2
    """

    return _of_both(_homes_moved, old, new)


def _homes_moved(old: Placement, new: Placement) -> jax.Array:
    was, now = (one.log2phy[:, 0] // (one.n_physical // one.ep_size) for one in (old, new))
    return (was != now).sum(dtype=jnp.int32)


def _of_both(
    function: Callable[[Placement, Placement], jax.Array], old: Placement, new: Placement
) -> jax.Array:
    """`function` of two placements, or layer by layer of stacked ones."""
    for name, placement in (("old", old), ("new", new)):
        if not isinstance(placement, Placement):
            raise TypeError(
                f"{name}: expected a lplb_jax.Placement, got {type(placement).__name__}"
            )
    expected, given = (
        [*placement.phy2log.shape[:-1], placement.n_logical, placement.ep_size]
        for placement in (old, new)
    )
    if given != expected:
        raise ValueError(
            f"new: expected [(layers,) n_logical, ep_size] = {expected} as old has, got {given}"
        )
    with jax.transfer_guard("allow"):  # of the placements' tables
        return _mapped_pair(function, *jax.tree.map(_native.whole, (old, new)))


@functools.partial(jax.jit, static_argnums=0)
def _mapped_pair(
    function: Callable[[Placement, Placement], jax.Array], old: Placement, new: Placement
) -> jax.Array:
    return (jax.vmap(function) if old.phy2log.ndim == 2 else function)(old, new)


def _by_layer(
    function: Callable[[jax.Array, Placement], Any],
    name: str,
    array: Any,
    placement: Placement,
    size: int,
) -> Any:
    """`function` of the last axis of `array`, of length `size`, and its layer's placement."""
    layers = placement.phy2log.shape[:-1]
    shape = jnp.shape(array)
    if not shape or shape[-1] != size or shape[: len(layers)] != layers:
        expected = ", ".join(map(str, (*layers, "...", size)))
        raise ValueError(f"{name}: expected [{expected}], got {list(shape)}")
    array = _native.whole(array)
    with jax.transfer_guard("allow"):  # of the placement's tables
        return _mapped(function, len(layers), array, jax.tree.map(_native.whole, placement))


# Without jit, JAX would compile each operation separately and transfer each constant.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _mapped(
    function: Callable[[jax.Array, Placement], Any],
    n_layers: int,
    array: jax.Array,
    placement: Placement,
) -> Any:
    for axis in range(array.ndim - 1)[::-1]:
        function = jax.vmap(function, in_axes=(0, 0 if axis < n_layers else None))
    return function(array, placement)
