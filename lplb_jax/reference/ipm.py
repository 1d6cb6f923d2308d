"""The interior point solver: real loads, and ranks of different speeds.

One group has G ranks. Along a topology, column d of rank u is an edge from u to v = dst[u, d] along
which 0 ≤ x ≤ cap may move. On any placement, expert e has x_er tokens on its host r, which sum to
its load. With weights w > 0 (relative speeds, of mean 1), we

    minimize t  such that  L + s = t·w,  s ≥ 0,  with L the ranks' loads.

`interior_point` has the iteration and `networks` the flows. The ranks sorted by y give cuts: for a
set S of ranks, the load that cannot leave S, divided by w(S), is a lower bound. The best one so far
is the certificate. The reported bound is recomputed from the loads in integers (`proven_by_units`,
`least_value`), and it alone decides whether the result counts as converged.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32

from lplb_jax.reference import graph, solver
from lplb_jax.reference.base_load import base_load_of
from lplb_jax.reference.interior_point import Fractional, iterate
from lplb_jax.reference.networks import EdgeNetwork, HostNetwork, net_inflow
from lplb_jax.reference.solver import arrived, inverse, quotas, status_of
from lplb_jax.reference.sums import INT32_MAX, exact_sum
from lplb_jax.reference.waves import balance
from lplb_jax.status import Status

CONVERGED_GAP = np.float32(1e-4)  # Of the largest load.
LEAST_WEIGHT = np.float32(2.0**-40)  # Of the largest: smaller weights count as this.
MOST_LOAD = np.float32(3.4e38)  # Just below float32's maximum, so that rounding cannot exceed it.
MOST_TOKENS = np.float32(2147483520.0)  # The largest float32 that is an int32.
INFINITY = np.int32(0x7F800000)  # The bits of float32's infinity.


def ipm(
    loads: Int32[Array, "n_sources row"] | Float32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    weights: Float32[Array, " group_size"],
    *,
    ep_size: int,
    weighted: int,
    repair: int,
    cusolverdx: int = 0,
) -> tuple[Array, Array, Array, Int32[Array, " n_groups"]]:
    """Quotas, largest loads, lower bounds and status of all groups; `loads` as for `solve`.

    Quotas have the loads' dtype. The largest loads and lower bounds are int32 if loads are int32
    and `weighted` is 0; otherwise float32 and divided by the weights. `repair`: whether waves
    repair the rounded plan. `cusolverdx` selects a factorization in the native code only.
    """
    nothing = jnp.zeros(ep_size, jnp.int32)
    options = {"ep_size": ep_size, "weighted": weighted, "repair": repair}
    return ipm_costs(loads, phy2log, log2phy, r2o, weights, nothing, **options)


def ipm_costs(
    loads: Int32[Array, "n_sources row"] | Float32[Array, "n_sources row"],
    phy2log: Int32[Array, " n_physical"],
    log2phy: Int32[Array, "n_logical max_replicas"],
    r2o: Int32[Array, "group_size n_columns"],
    weights: Float32[Array, " group_size"],
    base_load: Int32[Array, " ep_size"],
    *,
    ep_size: int,
    weighted: int,
    repair: int,
) -> tuple[Array, Array, Array, Int32[Array, " n_groups"]]:
    """`ipm` with a `base_load` on every rank."""
    n_logical = log2phy.shape[0]
    counts = loads[:, :n_logical]
    negative = ~(counts >= 0)  # Includes NaN.
    counts = jnp.where(negative, 0, counts)
    negative, invalid = negative.any(axis=0), (loads[:, n_logical:] != 0).any()
    weights, taken = normalised(weights)
    if not weighted:
        weights, taken = jnp.ones_like(weights), taken | True
    base = base_load_of(base_load, tile=1)
    if jnp.issubdtype(loads.dtype, jnp.integer):
        total: tuple[Any, ...] = exact_sum(counts, axis=0)
        options = {"weights": weights, "finish": partial(finish, weights, weighted, repair)}
        along, anywhere, of_ranks = tokens_along_topology, tokens_anywhere, base
    else:
        total = (jnp.minimum(counts.sum(axis=0), np.finfo(np.float32).max),)  # Overflows below.
        options = {"weights": weights}
        along, anywhere = reals_along_topology, reals_anywhere
        of_ranks = base.tokens.astype(jnp.float32)

    if r2o.shape[1] == 0:
        cells = graph.cells_of(phy2log, log2phy, ep_size)
        quota, *values = anywhere(*total, base_load=of_ranks, cells=cells, **options)
        max_load, bound, overflow = (value[None] for value in values)
        # Loads of experts without a slot reach no rank; they only invalidate the placement.
        negative = (negative & cells.hosts.any(axis=1)).any() | base.negative.any()
        wrong = graph.misplaced(phy2log, log2phy, cells)
    else:
        slots = phy2log.reshape(ep_size // len(r2o), len(r2o), -1)
        n_local = n_logical // ep_size
        experts = jnp.clip(slots[:, :, :n_local], 0, n_logical - 1)
        n_redundant = slots.shape[2] - n_local
        groups = slots.shape[:2]
        of_ranks = jax.tree.map(lambda of_rank: of_rank.reshape(groups), of_ranks)
        quota, max_load, bound, overflow = jax.vmap(
            lambda *own: along(*own, r2o=r2o, n_redundant=n_redundant, **options)
        )(*(of_expert[experts] for of_expert in total), of_ranks)
        negative = negative[experts].any(axis=(1, 2))
        negative |= base.negative.reshape(groups).any(axis=1)
        wrong = solver.misplaced(slots, log2phy, r2o)
    gap = (max_load - bound).astype(jnp.float32)
    converged = overflow | (gap <= CONVERGED_GAP * max_load.astype(jnp.float32))
    status = status_of(overflow, negative, invalid, wrong)
    status = status | jnp.where(converged & taken, 0, Status.NOT_CONVERGED).astype(jnp.int32)
    return quota.reshape(-1), max_load, bound, status


def normalised(
    weights: Float32[Array, " group_size"],
) -> tuple[Float32[Array, " group_size"], Bool[Array, ""]]:
    """Weights of mean 1, and whether they equal the given ones up to scale.

    If one is not positive and finite (subnormal numbers count as 0), all count as equal. None
    counts as less than LEAST_WEIGHT of the largest.
    """
    speeds = ((weights >= np.finfo(np.float32).tiny) & (weights < jnp.inf)).all()
    weights = jnp.where(speeds, weights, 1)
    weights = weights * power_of_two(-exponent(weights.max()))  # Their sum could overflow.
    least = LEAST_WEIGHT * weights.max()
    taken = speeds & (weights >= least).all()
    weights = jnp.maximum(weights, least)
    return weights / weights.mean(), taken


def tokens_along_topology(own, too_large, base_load, r2o, n_redundant, *, weights, finish):
    """Integer quotas, largest load, lower bound and overflow of one group."""
    dst = inverse(r2o)
    base, base_too_large = exact_sum(jnp.concatenate([own, base_load.tokens[:, None]], 1), axis=1)
    cap, entering = solver.column_loads(own, r2o, dst, n_redundant)
    _, most_too_large = exact_sum(jnp.concatenate([base[:, None], entering], axis=1), axis=1)
    overflow = too_large.any() | base_too_large.any() | most_too_large.any()
    base, cap = jnp.where(overflow, 0, base), jnp.where(overflow, 0, cap)

    best = interior_point(base.astype(jnp.float32), cap.astype(jnp.float32), weights, r2o, dst)
    moved = jnp.minimum(jnp.round(jnp.minimum(best.plan[0], MOST_TOKENS)).astype(jnp.int32), cap)
    load = base + net_inflow(moved, r2o)
    moved, max_load, bound = finish(
        load,
        moved,
        solver.first_target(base, cap),
        best.cut,
        cut_value(base, cap, best.cut, dst),
        solver.moves(cap, r2o, dst),
    )
    max_load = jnp.where(overflow, jnp.asarray(INT32_MAX, max_load.dtype), max_load)
    return quotas(own, moved, r2o, n_redundant), max_load, bound, overflow


def tokens_anywhere(total, too_large, base_load, cells, *, weights, finish):
    """Integer quotas, largest load, lower bound and overflow of any placement."""
    hosts = cells.hosts
    overflow = graph.may_overflow(total, too_large, base_load, cells)
    loads = jnp.where(overflow | ~hosts.any(axis=1), 0, total)
    base = base_load.none_if(overflow).tokens
    shares, cut = between_hosts(loads.astype(jnp.float32), base.astype(jnp.float32), hosts, weights)
    tokens = whole_tokens(shares, loads, hosts)
    load = base + tokens.sum(axis=0, dtype=jnp.int32)
    kept = jnp.concatenate([jnp.where(confined(hosts, cut), loads, 0), jnp.where(cut, base, 0)])
    tokens, max_load, bound = finish(
        load,
        tokens,
        graph.first_target(load, tokens, base, cells),
        cut,
        limbs(kept),
        graph.moves(cells),
    )
    max_load = jnp.where(overflow, jnp.asarray(INT32_MAX, max_load.dtype), max_load)
    return graph.quotas(tokens, total, overflow, cells), max_load, bound, overflow


def whole_tokens(
    shares: Float32[Array, "n_logical ep_size"],
    total: Int32[Array, " n_logical"],
    hosts: Bool[Array, "n_logical ep_size"],
) -> Int32[Array, "n_logical ep_size"]:
    """Whole tokens by these shares: rounds the prefix sums over an expert's hosts.

    The total is then exact, and each host is off by less than one, apart from float32 rounding.
    """
    last = jnp.where(hosts, jnp.arange(hosts.shape[1]), -1).max(axis=1)

    def deal(state, of_rank):
        share, given = state
        rank, more = of_rank
        share = share + more
        upto = jnp.round(jnp.minimum(share * total.astype(jnp.float32), MOST_TOKENS))
        upto = jnp.clip(upto.astype(jnp.int32), given, total)
        upto = jnp.where(rank == last, total, jnp.where(hosts[:, rank], upto, given))
        return (share, upto), upto - given

    nothing = shares[:, 0] * 0
    state = (nothing, nothing.astype(jnp.int32))
    _, tokens = lax.scan(deal, state, (jnp.arange(hosts.shape[1]), shares.T))
    return tokens.T


def finish(weights, weighted, repair, load, moving, target, cut, kept, moves):
    """The plan of tokens, repaired or not, its largest load / weight, and its lower bound.

    `target` is a proven bound; the ranks of `cut` provably keep `kept` tokens, in limbs; `moves`
    are the waves' moves.
    """
    if not weighted:
        size = jnp.maximum(cut.sum(dtype=jnp.int32), 1)
        bound = jnp.maximum(target, ceil_divide(kept[0], kept[1], size))
        if repair:
            load, moving, bound = balance(load, moving, bound, **moves)
        return moving, load.max(), bound
    bound = least_value(kept[0], kept[1], cut, weights)
    if repair:
        # Every rank has its own target; ranks that no token can leave keep their load.
        load, moving, bound = balance(
            load,
            moving,
            bound,
            allowed=lambda value: token_limits(value, weights),
            proven=lambda load, unseen, _: least_value(
                *limbs(jnp.where(unseen, load, 0)), unseen, weights
            ),
            **moves,
        )
    max_load = (load.astype(jnp.float32) / weights).max()
    return moving, max_load, jnp.minimum(bound, max_load)


def limbs(values: Int32[Array, " n"]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """The sum of values ≥ 0, exactly: high · 2¹⁶ + low."""
    return (values >> 16).sum(dtype=jnp.int32), (values & 0xFFFF).sum(dtype=jnp.int32)


def token_limits(
    value: Float32[Array, ""], w: Float32[Array, " group_size"]
) -> Int32[Array, " group_size"]:
    """The most tokens of every rank at a load / weight of `value`.

    Rounded up by more than float32 can round down, so that more tokens are certainly above `value`.
    """
    limit = jnp.floor(value * w * np.float32(1 + 2.0**-21))
    tokens = jnp.minimum(limit, MOST_TOKENS).astype(jnp.int32)
    return jnp.where(limit < MOST_TOKENS, tokens, INT32_MAX)


def least_value(
    high: Int32[Array, ""],
    low: Int32[Array, ""],
    cut: Bool[Array, " group_size"],
    w: Float32[Array, " group_size"],
) -> Float32[Array, ""]:
    """The least load / weight at which the ranks of `cut` can hold high · 2¹⁶ + low tokens.

    Found bit by bit, since the bits of nonnegative floats are ordered like the floats.
    """

    def too_little(bits):
        limit = jnp.where(cut, token_limits(lax.bitcast_convert_type(bits, jnp.float32), w), 0)
        return positive(
            high - (limit >> 16).sum(dtype=jnp.int32), low - (limit & 0xFFFF).sum(dtype=jnp.int32)
        )

    def add_bit(i, bits):
        more = bits | (jnp.int32(1) << (30 - i))
        return jnp.where((more < INFINITY) & too_little(more), more, bits)

    most = lax.fori_loop(0, 31, add_bit, high & 0)
    return jnp.where(positive(high, low), lax.bitcast_convert_type(most + 1, jnp.float32), 0)


def positive(high: Int32[Array, ""], low: Int32[Array, ""]) -> Bool[Array, ""]:
    """high · 2¹⁶ + low > 0."""
    high = high + (low >> 16)
    return (high > 0) | ((high == 0) & ((low & 0xFFFF) > 0))


def reals_along_topology(own, base_load, r2o, n_redundant, *, weights):
    """Real quotas, largest load / weight, lower bound and overflow of one group."""
    dst = inverse(r2o)
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    cap = jnp.where(dst == jnp.arange(len(own))[:, None], 0, replicated.sum(axis=1))
    base = own.sum(axis=1) + base_load
    overflow = too_much(base + arrived(cap, r2o).sum(axis=1), weights)
    base, cap = jnp.where(overflow, 0, base), jnp.where(overflow, 0, cap)

    best = interior_point(base, cap, weights, r2o, dst)
    quota = quotas(own, best.plan[0], r2o, n_redundant)
    load = quota.sum(axis=1) + base_load
    max_load = jnp.where(overflow, jnp.inf, (load / weights).max())
    local = jnp.arange(n_redundant)
    leaves = jnp.zeros(own.shape, bool)
    leaves = leaves.at[:, :n_redundant].set(~best.cut[dst][:, local % dst.shape[1]])
    kept = jnp.concatenate([jnp.where(leaves, 0, own), base_load[:, None]], axis=1)
    kept = jnp.where(best.cut[:, None] & ~overflow, kept, 0)
    bound = proven_by_units(kept, best.cut, weights)
    return quota, max_load, jnp.minimum(bound, max_load), overflow


def reals_anywhere(total, base_load, cells, *, weights):
    """Real quotas, largest load / weight, lower bound and overflow of any placement."""
    hosts = cells.hosts
    overflow = too_much(base_load + jnp.where(hosts, total[:, None], 0).sum(axis=0), weights)
    loads = jnp.where(overflow | ~hosts.any(axis=1), 0, total)
    base = jnp.where(overflow, 0, base_load)
    shares, cut = between_hosts(loads, base, hosts, weights)
    quota = graph.quotas(shares * loads[:, None], total, overflow, cells)
    load = quota.reshape(len(weights), -1).sum(axis=1) + base
    max_load = jnp.where(overflow, jnp.inf, (load / weights).max())
    kept = jnp.concatenate([jnp.where(confined(hosts, cut), loads, 0), jnp.where(cut, base, 0)])
    bound = proven_by_units(kept[:, None], cut, weights)
    return quota, max_load, jnp.minimum(bound, max_load), overflow


def too_much(
    most: Float32[Array, " n_ranks"], weights: Float32[Array, " n_ranks"]
) -> Bool[Array, ""]:
    """Whether some rank's load, or load / weight, could exceed MOST_LOAD."""
    return ~(jnp.maximum(most, most / weights).max() <= MOST_LOAD)


def confined(
    hosts: Bool[Array, "n_logical ep_size"], cut: Bool[Array, " ep_size"]
) -> Bool[Array, " n_logical"]:
    """The experts whose hosts are all in the cut."""
    return ~(hosts & ~cut).any(axis=1)


def proven_by_units(
    kept: Float32[Array, "n_parts n_experts"],
    cut: Bool[Array, " n_ranks"],
    w: Float32[Array, " n_ranks"],
) -> Float32[Array, ""]:
    """The bound proven by the loads that cannot leave the cut, never rounded up.

    Loads are summed in units of a power of two: each part's sum stays below 2³⁰, and truncation
    loses less than 2⁻²⁸ of the largest of these sums per expert.
    """
    # In two steps: the smallest loads need a scale beyond a single float32 power of two.
    first = -exponent(kept.max())
    kept = kept * power_of_two(first)
    second = 28 - exponent(kept.sum(axis=1).max())
    units = (kept * power_of_two(second)).astype(jnp.int32).sum(axis=1, dtype=jnp.int32)
    high, low = limbs(units)
    total = high.astype(jnp.float32) * 65536 + low.astype(jnp.float32)
    weight = jnp.where(cut, w, 0).sum()
    safe = np.float32(1 - 2.0**-23 * (len(w) + 4))
    proven = total / jnp.where(cut.any(), weight, 1) * safe
    return proven * power_of_two(-second) * power_of_two(-first)


def exponent(value: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """e of value = m · 2^e with 1 ≤ m < 2, for values ≥ 0; from −126 to 126, so 2^±e is normal."""
    return jnp.clip((lax.bitcast_convert_type(value, jnp.int32) >> 23) - 127, -126, 126)


def power_of_two(e: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """2^e, for −126 ≤ e ≤ 127."""
    return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def interior_point(
    base: Float32[Array, " group_size"],
    cap: Float32[Array, "group_size n_columns"],
    w: Float32[Array, " group_size"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
) -> Fractional:
    """Along a topology; in the result, only the plan is in the loads' unit."""
    # Scale by a power of two first, since the sum of all ranks' loads could overflow.
    power = exponent(base.max())
    base, cap = base * power_of_two(-power), cap * power_of_two(-power)
    scale = jnp.maximum(base.sum() / w.sum(), ((base - cap.sum(axis=1)) / w).max())
    unit = inverse_or_zero(scale)
    best = iterate(EdgeNetwork(base * unit, cap * unit, w, r2o, dst))
    return best._replace(plan=best.plan * scale * power_of_two(power))


def between_hosts(
    total: Float32[Array, " n_logical"],
    base: Float32[Array, " ep_size"],
    hosts: Bool[Array, "n_logical ep_size"],
    w: Float32[Array, " ep_size"],
) -> tuple[Float32[Array, "n_logical ep_size"], Bool[Array, " ep_size"]]:
    """Every host's share of each expert's load, and the ranks of the best cut."""
    power = power_of_two(-exponent(jnp.maximum(total.max(), base.max())))
    total, base = total * power, base * power
    alone = jnp.where(hosts.sum(axis=1) == 1, total, 0)
    stays = base + jnp.where(hosts, alone[:, None], 0).sum(axis=0)
    scale = jnp.maximum((total.sum() + base.sum()) / w.sum(), (stays / w).max())
    unit = inverse_or_zero(scale)
    network = HostNetwork(total * unit, base * unit, hosts, w)
    best = iterate(network)
    return network.shares(best.plan), best.cut


def inverse_or_zero(scale: Float32[Array, ""]) -> Float32[Array, ""]:
    """1 / scale; 0 for 0."""
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


def cut_value(
    base: Int32[Array, " group_size"],
    cap: Int32[Array, "group_size n_columns"],
    cut: Bool[Array, " group_size"],
    dst: Int32[Array, "group_size n_columns"],
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """The load that cannot leave the cut, exactly: high · 2¹⁶ + low."""
    leaves = cut[:, None] & ~cut[dst]

    def limb(part):
        return jnp.where(cut, part(base), 0).sum(dtype=jnp.int32) - jnp.where(
            leaves, part(cap), 0
        ).sum(dtype=jnp.int32)

    return limb(lambda a: a >> 16), limb(lambda a: a & 0xFFFF)


def ceil_divide(
    high: Int32[Array, ""], low: Int32[Array, ""], n: Int32[Array, ""]
) -> Int32[Array, ""]:
    """⌈(high · 2¹⁶ + low) / n⌉, at least 0."""
    high, low = high + (low >> 16), low & 0xFFFF
    quotient = high // n
    value = (quotient << 16) + (((high - quotient * n) << 16) + low + n - 1) // n
    return jnp.where(high < 0, 0, value)
