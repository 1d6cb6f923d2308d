"""The interior point solver: real loads, and ranks of different speeds.

One group has G ranks; column d of rank u is an edge from u to v = dst[u, d] along which
0 ≤ x ≤ cap may move. With weights w > 0 (relative speeds, of mean 1), we look for

    minimise t  such that  L + s = t·w,  s ≥ 0,  L = base − Σ x over edges out + Σ x over edges in.

A primal–dual predictor–corrector (Mehrotra) follows the central path. Per rank there are s and the
multiplier y ≥ 0 with wᵀy = 1; per edge x, xb = cap − x and their multipliers zl, zu ≥ 0 with
zl − zu = y_v − y_u. How far the iterate is from that are the residuals

    rp = t·w − L − s,   rt = 1 − wᵀy,   rd = (y_v − y_u) − (zl − zu)

and what the products x·zl, xb·zu and s·y lack to their targets are rl, ru and rs. A Newton step
dx, …, dt takes all of them to 0. Eliminating all but dy and dt leaves the G × G system

    M dy + w dt = q,   wᵀdy = rt,   M = diag(s/y) + Σ_e H_e (1_u − 1_v)(1_u − 1_v)ᵀ

with H_e = 1 / (zl/x + zu/xb). M is a graph Laplacian with a positive diagonal: near the solution
almost singular, and the differences of dy along edges are what matters. Two safeguards make float32
enough: `factor` never subtracts, and `solve_saddle` takes the mean out of the right-hand side.

The ranks sorted by y give cuts: for a set S of ranks, what cannot leave S is a lower bound,
(base(S) − cap(edges leaving S)) / w(S) ≤ t*. The best one so far is the certificate. What is
reported as proven is computed anew from the loads, in integers (`proven_by_units`,
`least_value`), and it alone decides whether the result counts as converged.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32

from lplb_jax.reference.solver import (
    INT32_MAX,
    Plan,
    arrived,
    exact_sum,
    finish_waves,
    first_target,
    levels,
    misplaced,
    push,
    quotas,
)
from lplb_jax.status import Status

MAX_STEPS = 16  # 8 do on sparse topologies; where a rank has 30 edges, 12 were seen.
STOP_GAP = np.float32(5e-5)  # Of the largest load.
CONVERGED_GAP = np.float32(1e-4)  # Likewise.
LEAST_WEIGHT = np.float32(2.0**-40)  # Of the largest: smaller weights count as this.
MOST_LOAD = np.float32(3.4e38)  # Just below float32's end, so that no rounding passes it.
MOST_TOKENS = np.float32(2147483520.0)  # The largest float32 that is an int32.
INFINITY = np.int32(0x7F800000)  # The bits of float32's infinity.
LEAST_EDGE = np.float32(1e-9)  # Of a rank's mean load: edges that move less are left out.
START_SLACK = np.float32(0.03)  # t above the largest load of the first plan.
START_PRODUCT = np.float32(0.05)  # x·√(zl·zu) of the first iterate, of its s·y.
BACK_OFF = np.float32(0.99)  # How much of the way to the boundary a step goes.
LEAST_SIGMA = np.float32(0.01)  # The corrector's target is at least this much of the mean product,
CAUTION = np.float32(0.3)  # and this much of it, times the square of what the predictor fell short.
LEAST_MU = np.float32(3e-8)
LEAST_PRIMAL = np.float32(1e-12)
LEAST_SHARE = np.float32(1e-3)  # Of an edge's cap, where that is below LEAST_PRIMAL.
LEAST_DUAL = np.float32(1e-20)


class Fractional(NamedTuple):
    """What the interior point found.

    `moved` is a legal plan, `largest` its largest load / weight, `cut` the ranks of the best cut,
    `bound` that cut's value in float32, which proves nothing, and `steps` how many it took.
    """

    moved: Float32[Array, "group_size n_columns"]
    largest: Float32[Array, ""]
    cut: Bool[Array, " group_size"]
    bound: Float32[Array, ""]
    steps: Int32[Array, ""]


class Network(NamedTuple):
    """One group as the iteration sees it: its largest load / weight is about 1.

    `live` are the edges that count; the others move nothing.
    """

    base: Float32[Array, " group_size"]
    cap: Float32[Array, "group_size n_columns"]
    w: Float32[Array, " group_size"]
    r2o: Int32[Array, "group_size n_columns"]
    dst: Int32[Array, "group_size n_columns"]
    live: Bool[Array, "group_size n_columns"]

    def loads(self, x: Float32[Array, "group_size n_columns"]) -> Float32[Array, " group_size"]:
        """L, the ranks' loads under the plan x."""
        return self.base + net_inflow(x, self.r2o)

    def along_edges(self, y: Float32[Array, " group_size"]) -> Array:
        """y_v − y_u of every edge."""
        return y[self.dst] - y[:, None]

    def over_edges(self, values: Float32[Array, "group_size n_columns"]) -> Float32[Array, ""]:
        """The sum over the edges that count."""
        return jnp.where(self.live, values, 0).sum()


class Iterate(NamedTuple):
    """Primal and dual variables, all but t positive; or a step of them."""

    x: Float32[Array, "group_size n_columns"]
    xb: Float32[Array, "group_size n_columns"]
    zl: Float32[Array, "group_size n_columns"]
    zu: Float32[Array, "group_size n_columns"]
    s: Float32[Array, " group_size"]
    y: Float32[Array, " group_size"]
    t: Float32[Array, ""]


class Lack(NamedTuple):
    """rl, ru, rs: what the products lack to their targets."""

    xzl: Float32[Array, "group_size n_columns"]
    xbzu: Float32[Array, "group_size n_columns"]
    sy: Float32[Array, " group_size"]


class Factor(NamedTuple):
    """M = (I − lower) diag(pivot) (I − lower)ᵀ; lower ≥ 0, pivot > 0."""

    lower: Float32[Array, "group_size group_size"]
    pivot: Float32[Array, " group_size"]


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

    Quotas are of the loads' type. The largest loads and lower bounds are int32 where loads are
    int32 and `weighted` is 0, else float32 and divided by the weights. `repair`: whether waves
    finish what is rounded. `cusolverdx` changes nothing here: another way to compute `factor`.
    """
    n_logical = log2phy.shape[0]
    group_size = r2o.shape[0]
    n_local = n_logical // ep_size
    slots = phy2log.reshape(ep_size // group_size, group_size, -1)
    experts = jnp.clip(slots[:, :, :n_local], 0, n_logical - 1)
    n_redundant = slots.shape[2] - n_local

    counts = loads[:, :n_logical]
    negative = ~(counts >= 0)  # NaN, too.
    counts = jnp.where(negative, 0, counts)
    weights, taken = normalised(weights)
    if not weighted:
        weights, taken = jnp.ones_like(weights), taken | True
    if jnp.issubdtype(loads.dtype, jnp.integer):
        total, too_large = exact_sum(counts, axis=0)
        finish = weighted_tokens if weighted else equal_tokens
        results = jax.vmap(
            lambda own, too_large: solve_tokens(
                own, too_large, r2o, weights, n_redundant, finish, repair
            )
        )(total[experts], too_large[experts].any(axis=(1, 2)))
    else:
        results = jax.vmap(lambda own: solve_reals(own, r2o, weights, n_redundant))(
            counts.sum(axis=0)[experts]
        )
    quota, max_load, bound, overflow = results
    gap = (max_load - bound).astype(jnp.float32)
    converged = overflow | (gap <= CONVERGED_GAP * max_load.astype(jnp.float32))
    status = (
        jnp.where(overflow, Status.LOAD_OVERFLOW, 0)
        | jnp.where(negative.any(axis=0)[experts].any(axis=(1, 2)), Status.NEGATIVE_LOAD, 0)
        | jnp.where((loads[:, n_logical:] != 0).any(), Status.INVALID_INDEX, 0)
        | jnp.where(misplaced(slots, log2phy, r2o), Status.BAD_PLACEMENT, 0)
        | jnp.where(converged & taken, 0, Status.NOT_CONVERGED)
    )
    return quota.reshape(-1), max_load, bound, status.astype(jnp.int32)


def normalised(
    weights: Float32[Array, " group_size"],
) -> tuple[Float32[Array, " group_size"], Bool[Array, ""]]:
    """Weights of mean 1, and whether they are those given.

    Where one is not positive and finite (numbers that are not normal count as 0), all count as
    equal. None counts as less than LEAST_WEIGHT of the largest.
    """
    speeds = ((weights >= np.finfo(np.float32).tiny) & (weights < jnp.inf)).all()
    weights = jnp.where(speeds, weights, 1)
    weights = weights * power_of_two(-exponent(weights.max()))  # Their sum could overflow.
    least = LEAST_WEIGHT * weights.max()
    taken = speeds & (weights >= least).all()
    weights = jnp.maximum(weights, least)
    return weights / weights.mean(), taken


def solve_tokens(own, too_large, r2o, weights, n_redundant, finish, repair):
    """Integer quotas, largest load, lower bound and overflow of one group."""
    dst = inverse(r2o)
    base, base_too_large = exact_sum(own, axis=1)
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    cap = jnp.where(dst == jnp.arange(len(own))[:, None], 0, exact_sum(replicated, axis=1)[0])
    entering = arrived(cap, r2o)
    _, most_too_large = exact_sum(jnp.concatenate([base[:, None], entering], axis=1), axis=1)
    overflow = too_large | base_too_large.any() | most_too_large.any()
    base, cap = jnp.where(overflow, 0, base), jnp.where(overflow, 0, cap)

    best = interior_point(base.astype(jnp.float32), cap.astype(jnp.float32), weights, r2o, dst)
    moved = jnp.minimum(jnp.round(jnp.minimum(best.moved, MOST_TOKENS)).astype(jnp.int32), cap)
    load = base + net_inflow(moved, r2o)
    plan, max_load, bound = finish(
        Plan(load, moved, first_target(base, cap)), base, cap, best.cut, weights, r2o, dst, repair
    )
    max_load = jnp.where(overflow, jnp.asarray(INT32_MAX, max_load.dtype), max_load)
    return quotas(own, plan.moved, r2o, n_redundant), max_load, bound, overflow


def equal_tokens(plan, base, cap, cut, weights, r2o, dst, repair):
    """The plan, repaired or not, its largest load and its lower bound: ranks of equal speed."""
    size = jnp.maximum(cut.sum(dtype=jnp.int32), 1)
    proven = ceil_divide(*cut_value(base, cap, cut, dst), size)
    plan = plan._replace(target=jnp.maximum(plan.target, proven))
    if repair:
        plan = finish_waves(plan, cap, r2o, dst)
    return plan, plan.load.max(), plan.target


def weighted_tokens(plan, base, cap, cut, weights, r2o, dst, repair):
    """Likewise for ranks of different speeds: the largest load / weight."""
    bound = least_value(*cut_value(base, cap, cut, dst), cut, weights)
    if repair:
        plan, bound = finish_weighted_waves(plan, bound, cap, weights, r2o, dst)
    max_load = (plan.load.astype(jnp.float32) / weights).max()
    return plan, max_load, jnp.minimum(bound, max_load)


def token_limits(
    value: Float32[Array, ""], w: Float32[Array, " group_size"]
) -> Int32[Array, " group_size"]:
    """The most tokens of every rank whose load / weight is `value`.

    Rounded up by more than float32 can have rounded down: what passes them is above `value`.
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
    """The least load / weight at which the ranks of `cut` may have high · 2¹⁶ + low tokens.

    As the bits of floats are ordered as the floats are, it is found bit by bit.
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


def finish_weighted_waves(
    plan: Plan,
    value: Float32[Array, ""],
    cap: Int32[Array, "group_size n_columns"],
    w: Float32[Array, " group_size"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
) -> tuple[Plan, Float32[Array, ""]]:
    """Waves from any legal plan and proven value to the least load / weight in whole tokens.

    As `finish_waves`, except that every rank has a target of its own, what `value` allows it.
    """

    def relative(plan: Plan, value) -> Plan:
        """Loads as they differ from what is allowed; the target is 0."""
        return plan._replace(load=plan.load - token_limits(value, w), target=plan.target & 0)

    def phase(state):
        plan, value = state
        ahead = relative(plan, value)
        level, depth = levels(ahead, cap, r2o, dst)
        unseen = level < 0
        stuck = (unseen & (ahead.load > 0)).any()
        pushed = push(ahead, cap, r2o, dst, level, jnp.where(stuck, 0, depth))
        plan = plan._replace(load=plan.load + pushed.load - ahead.load, moved=pushed.moved)
        # Nothing more can leave the unseen ranks: they must be allowed what they have.
        kept = jnp.where(unseen, plan.load, 0)
        high = (kept >> 16).sum(dtype=jnp.int32)
        low = (kept & 0xFFFF).sum(dtype=jnp.int32)
        return plan, jnp.where(stuck, least_value(high, low, unseen, w), value)

    return lax.while_loop(lambda state: (relative(*state).load > 0).any(), phase, (plan, value))


def solve_reals(own, r2o, weights, n_redundant):
    """Real quotas, largest load / weight, lower bound and overflow of one group."""
    dst = inverse(r2o)
    own = jnp.minimum(own, np.finfo(np.float32).max)  # The overflow shows below.
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    cap = jnp.where(dst == jnp.arange(len(own))[:, None], 0, replicated.sum(axis=1))
    base = own.sum(axis=1)
    most = base + arrived(cap, r2o).sum(axis=1)
    overflow = ~(jnp.maximum(most, most / weights).max() <= MOST_LOAD)
    base, cap = jnp.where(overflow, 0, base), jnp.where(overflow, 0, cap)

    best = interior_point(base, cap, weights, r2o, dst)
    quota = quotas(own, best.moved, r2o, n_redundant)
    max_load = jnp.where(overflow, jnp.inf, (quota.sum(axis=1) / weights).max())
    bound = proven_by_units(jnp.where(overflow, 0, own), best.cut, weights, dst, n_redundant)
    return quota, max_load, jnp.minimum(bound, max_load), overflow


def proven_by_units(
    own: Float32[Array, "group_size n_local"],
    cut: Bool[Array, " group_size"],
    w: Float32[Array, " group_size"],
    dst: Int32[Array, "group_size n_columns"],
    n_redundant: int,
) -> Float32[Array, ""]:
    """What the experts all of whose slots are in the cut prove, never rounded up.

    Their loads are added in units of a power of two: a rank's sum stays below 2³⁰, and what is
    lost of an expert is below 2⁻²⁸ of the largest of those sums.
    """
    local = jnp.arange(n_redundant)
    leaves = jnp.zeros(own.shape, bool).at[:, :n_redundant].set(~cut[dst][:, local % dst.shape[1]])
    kept = jnp.where(cut[:, None] & ~leaves, own, 0)
    # In two steps: the smallest loads take more than one power of two to get that far.
    first = -exponent(kept.max())
    kept = kept * power_of_two(first)
    second = 28 - exponent(kept.sum(axis=1).max())
    units = (kept * power_of_two(second)).astype(jnp.int32).sum(axis=1, dtype=jnp.int32)
    total = (units >> 16).sum(dtype=jnp.int32).astype(jnp.float32) * 65536
    total = total + (units & 0xFFFF).sum(dtype=jnp.int32).astype(jnp.float32)
    weight = jnp.where(cut, w, 0).sum()
    safe = np.float32(1 - 2.0**-23 * (len(w) + 4))
    proven = total / jnp.where(cut.any(), weight, 1) * safe
    return proven * power_of_two(-second) * power_of_two(-first)


def exponent(value: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """e of value = m · 2^e with 1 ≤ m < 2, of values ≥ 0; from −126 to 126, so that 2^±e is."""
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
    """The best of at most MAX_STEPS + 1 iterates and the best cut; feasible in any case."""
    # A power of two first, since the sum of all ranks' loads could overflow.
    power = exponent(base.max())
    base, cap = base * power_of_two(-power), cap * power_of_two(-power)
    scale = jnp.maximum(base.sum() / w.sum(), ((base - cap.sum(axis=1)) / w).max())
    unit = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    cap = cap * unit
    network = Network(base * unit, cap, w, r2o, dst, cap > LEAST_EDGE * w[:, None])

    def advance(state):
        v, best = state
        v = step(network, v)
        return v, better_of(best, judge(network, v))

    def unfinished(state):
        _, best = state
        return (best.largest - best.bound > STOP_GAP * best.largest) & (best.steps < MAX_STEPS)

    v = start(network)
    _, best = lax.while_loop(unfinished, advance, (v, judge(network, v)))
    back = power_of_two(power)
    return best._replace(
        moved=best.moved * scale * back,
        largest=best.largest * scale * back,
        bound=best.bound * scale * back,
    )


def judge(network: Network, v: Iterate) -> Fractional:
    """The plan of an iterate, made legal, and the best of its cuts; `steps` is 0."""
    x = jnp.minimum(v.x, network.cap)
    plan = jnp.where(network.live & (x > 0), x, 0)
    largest = (network.loads(plan) / network.w).max()
    cut, bound = best_cut(network, v.y)
    # From the data, not a fresh constant: under shard_map it must vary over the same axes.
    return Fractional(plan, largest, cut, bound, network.live.sum(dtype=jnp.int32) & 0)


def better_of(best: Fractional, new: Fractional) -> Fractional:
    """The better plan and the better cut, one step later. Nothing is better where it is NaN."""
    better, higher = new.largest < best.largest, new.bound > best.bound
    return Fractional(
        jnp.where(better, new.moved, best.moved),
        jnp.where(better, new.largest, best.largest),
        jnp.where(higher, new.cut, best.cut),
        jnp.where(higher, new.bound, best.bound),
        best.steps + 1,
    )


def start(network: Network) -> Iterate:
    """Half of everything moves; y centred for that plan."""
    live = network.live
    x = jnp.where(live, network.cap / 2, 0)
    load = network.loads(x)
    t = (load / network.w).max() + START_SLACK
    s = t * network.w - load
    mu = 1 / (network.w / s).sum()
    y = mu / s
    # zl and zu of that difference whose product is m².
    m = jnp.where(live, START_PRODUCT * mu / jnp.where(live, x, 1), 0)
    h = network.along_edges(y) / 2
    larger = jnp.sqrt(m * m + h * h) + jnp.abs(h)
    smaller = m * m / jnp.where(live, larger, 1)
    zl, zu = jnp.where(h > 0, larger, smaller), jnp.where(h > 0, smaller, larger)
    x, zl, zu = (jnp.where(live, a, 1) for a in (x, zl, zu))
    return Iterate(x, x, zl, zu, s, y, t)


def step(network: Network, v: Iterate) -> Iterate:
    """One predictor and corrector."""
    live = network.live
    H = jnp.where(live, 1 / (v.zl / v.x + v.zu / v.xb), 0)
    M = factor(H, v.s / v.y, network.dst)

    # Predictor: straight at the solution. How far it gets says how much to centre.
    lack = Lack(-v.x * v.zl, -v.xb * v.zu, -v.s * v.y)
    d = direction(network, v, H, M, lack)
    primal, dual = step_lengths(v, d, live, np.float32(1))
    n_pairs = len(network.base) + 2 * live.sum(dtype=jnp.int32).astype(jnp.float32)
    mu = products(network, v, v) / n_pairs
    first, second = products(network, d, v), products(network, d, d)
    affine = mu * (1 - dual) + ((primal - dual) * first + primal * dual * second) / n_pairs
    reach = jnp.minimum(primal, dual)
    target = target_mu(mu, affine, reach)

    # Corrector: the same matrix, with the predictor's second-order terms.
    lack = Lack(
        target + lack.xzl - reach * d.x * d.zl,
        target + lack.xbzu - reach * d.xb * d.zu,
        target + lack.sy - reach * d.s * d.y,
    )
    d = direction(network, v, H, M, lack)
    primal, dual = step_lengths(v, d, live, BACK_OFF)
    least_x = jnp.minimum(LEAST_PRIMAL, LEAST_SHARE * network.cap)
    least_s = LEAST_PRIMAL * jnp.minimum(network.w, 1)
    return Iterate(
        jnp.maximum(v.x + primal * d.x, least_x),
        jnp.maximum(v.xb + primal * d.xb, least_x),
        jnp.maximum(v.zl + dual * d.zl, LEAST_DUAL),
        jnp.maximum(v.zu + dual * d.zu, LEAST_DUAL),
        jnp.maximum(v.s + primal * d.s, least_s),
        jnp.maximum(v.y + dual * d.y, LEAST_DUAL),
        v.t + primal * d.t,
    )


def direction(
    network: Network,
    v: Iterate,
    H: Float32[Array, "group_size n_columns"],
    M: Factor,
    lack: Lack,
) -> Iterate:
    """The Newton step from v."""
    rp = v.t * network.w - network.loads(jnp.where(network.live, v.x, 0)) - v.s
    rt = 1 - (network.w * v.y).sum()
    rd = network.along_edges(v.y) - (v.zl - v.zu)
    g = lack.xzl / v.x - lack.xbzu / v.xb - rd
    q = lack.sy / v.y - rp + net_inflow(H * g, network.r2o)
    dy, dt = solve_saddle(M, network.w, q, rt)
    dx = H * (g - network.along_edges(dy))
    dzl, dzu = (lack.xzl - v.zl * dx) / v.x, (lack.xbzu + v.zu * dx) / v.xb
    return Iterate(dx, -dx, dzl, dzu, (lack.sy - v.s * dy) / v.y, dy, dt)


def products(network: Network, a: Iterate, b: Iterate) -> Float32[Array, ""]:
    """The sum of all primal values of a times the dual ones of b."""
    return network.over_edges(a.x * b.zl + a.xb * b.zu) + (a.s * b.y).sum()


def target_mu(mu, affine, reach) -> Float32[Array, ""]:
    """The corrector's target for every product.

    Their mean is mu now, and would be `affine` if the predictor's step went `reach` of its way.
    """
    sigma = jnp.maximum(LEAST_SIGMA, CAUTION * (1 - reach) ** 2)
    return jnp.maximum(jnp.maximum((affine / mu) ** 3, sigma) * mu, LEAST_MU)


def step_lengths(
    v: Iterate,
    d: Iterate,
    live: Bool[Array, "group_size n_columns"],
    back_off: np.float32,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The longest primal and dual steps, at most 1, that keep everything positive."""

    def limit(a, da, where=True):
        falls = (da < 0) & where
        return jnp.where(falls, a / jnp.where(falls, -da, 1), jnp.inf).min()

    def shortest(*limits):
        return jnp.minimum(back_off * jnp.stack(limits).min(), 1)

    return (
        shortest(limit(v.x, d.x, live), limit(v.xb, d.xb, live), limit(v.s, d.s)),
        shortest(limit(v.zl, d.zl, live), limit(v.zu, d.zu, live), limit(v.y, d.y)),
    )


def factor(
    H: Float32[Array, "group_size n_columns"],
    excess: Float32[Array, " group_size"],
    dst: Int32[Array, "group_size n_columns"],
) -> Factor:
    """Eliminates without a single subtraction.

    M's diagonal is never stored: a row is its off-diagonals −o ≤ 0 and its excess, by how much the
    diagonal is larger than the sum of o. Elimination keeps that form, and all digits.
    """
    n = len(excess)
    rank = jnp.arange(n)
    o = jnp.zeros((n, n), jnp.float32).at[rank[:, None], dst].add(H)
    o = jnp.where(rank[:, None] == rank[None], 0, o + o.T)

    def eliminate(k, state):
        o, excess, lower, pivot = state
        row = jnp.where(rank > k, o[k], 0)
        p = excess[k] + row.sum()
        share = row / p
        return (
            o + share[:, None] * row[None],
            excess + share * excess[k],
            lower.at[:, k].set(share),
            pivot.at[k].set(p),
        )

    _, _, lower, pivot = lax.fori_loop(0, n, eliminate, (o, excess, o * 0, excess))
    return Factor(lower, pivot)


def solve_factored(M: Factor, q: Float32[Array, " group_size"]) -> Float32[Array, " group_size"]:
    """M⁻¹q, by substitution."""
    n = len(q)
    # As M varies, so that under shard_map the loop's carry keeps its type.
    q = q + 0 * M.pivot
    q = lax.fori_loop(0, n, lambda k, q: q + M.lower[:, k] * q[k], q) / M.pivot
    return lax.fori_loop(0, n, lambda i, q: q.at[n - 1 - i].add(M.lower[:, n - 1 - i] @ q), q)


def solve_saddle(
    M: Factor, w: Float32[Array, " group_size"], q: Float32[Array, " group_size"], rt: Array
) -> tuple[Float32[Array, " group_size"], Float32[Array, ""]]:
    """dy, dt of M dy + w dt = q, wᵀdy = rt.

    M⁻¹ is huge along k = M⁻¹w, so q is first freed of its mean, the part that dt takes up.
    """
    k = solve_factored(M, w)
    wk = w @ k
    k = k / wk
    mean = k @ q
    p = solve_factored(M, q - mean * w)
    rest = w @ p - rt
    return p - rest * k, mean + rest / wk


def best_cut(
    network: Network, y: Float32[Array, " group_size"]
) -> tuple[Bool[Array, " group_size"], Float32[Array, ""]]:
    """Of the sets {ranks whose y is at least y_r} the one that proves most, and its bound."""
    inside = y[None, :] >= y[:, None]
    leaves = inside[:, :, None] & ~inside[:, network.dst]
    value = jnp.where(inside, network.base[None], 0).sum(axis=1)
    value = value - jnp.where(leaves, network.cap[None], 0).sum(axis=(1, 2))
    value = value / jnp.where(inside, network.w[None], 0).sum(axis=1)
    best = value.argmax()
    return inside[best], value[best]


def cut_value(
    base: Int32[Array, " group_size"],
    cap: Int32[Array, "group_size n_columns"],
    cut: Bool[Array, " group_size"],
    dst: Int32[Array, "group_size n_columns"],
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """What cannot leave the cut, exactly: high · 2¹⁶ + low."""
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


def net_inflow(flow: Array, r2o: Int32[Array, "group_size n_columns"]) -> Array:
    """What arrives at every rank less what leaves it."""
    return (arrived(flow, r2o) - flow).sum(axis=1, dtype=flow.dtype)


def inverse(r2o: Int32[Array, "group_size n_columns"]) -> Int32[Array, "group_size n_columns"]:
    """dst: the rank that holds the copies of a rank's column."""
    rank = jnp.arange(r2o.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(r2o).at[r2o, jnp.arange(r2o.shape[1])].set(rank)
