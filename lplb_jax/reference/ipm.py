"""The interior point solver: real loads, and ranks of different speeds.

One group has G ranks; column d of rank u is an edge from u to v = dst[u, d] along which
0 ≤ x ≤ cap may move. With weights w > 0 (relative speeds), we look for

    minimise t  such that  L + s = t·w,  s ≥ 0,  L = base − Σ x over edges out + Σ x over edges in.

A primal–dual predictor–corrector (Mehrotra) follows the central path. Per rank there are s and the
multiplier y ≥ 0 with wᵀy = 1; per edge x, xb = cap − x and their multipliers zl, zu ≥ 0 with
zl − zu = y_v − y_u. Eliminating all but y and t leaves the G × G system

    M dy + w dt = q,  wᵀdy = rt,   M = diag(s/y) + Σ_e H_e (1_u − 1_v)(1_u − 1_v)ᵀ

M is a graph Laplacian with a positive diagonal: near the solution almost singular, and the
differences of dy along edges are what matters. Two safeguards make float32 enough: `factor` never
subtracts, and `solve_saddle` takes the mean out of the right-hand side first.

The ranks sorted by y give cuts: for a set S of ranks, what cannot leave S is a lower bound,
(base(S) − cap(edges leaving S)) / w(S) ≤ t*. The best one so far is the certificate.
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
    misplaced,
    quotas,
)
from lplb_jax.status import Status

MAX_STEPS = 16  # 8 do on sparse topologies; where a rank has 30 edges, 12 were seen.
STOP_GAP = np.float32(5e-5)  # Of the largest load.
CONVERGED_GAP = np.float32(1e-4)
LEAST_EDGE = np.float32(1e-9)  # Of the mean load: edges that could move less are left out.
BACK_OFF = np.float32(0.99)  # How much of the way to the boundary a step goes.
LEAST_SIGMA = np.float32(0.01)
LEAST_MU = np.float32(3e-8)
LEAST_PRIMAL = np.float32(1e-12)
LEAST_DUAL = np.float32(1e-20)


class Fractional(NamedTuple):
    """What the interior point found.

    `moved` is a legal plan, `largest` its largest load / weight, `cut` the ranks of the best cut,
    `bound` that cut's value in float32 (for an actual proof, see `cut_value`), and `steps` how many
    it took.
    """

    moved: Float32[Array, "group_size n_columns"]
    largest: Float32[Array, ""]
    cut: Bool[Array, " group_size"]
    bound: Float32[Array, ""]
    steps: Int32[Array, ""]


class Iterate(NamedTuple):
    """Primal and dual variables; all but t are positive."""

    x: Float32[Array, "group_size n_columns"]
    xb: Float32[Array, "group_size n_columns"]
    zl: Float32[Array, "group_size n_columns"]
    zu: Float32[Array, "group_size n_columns"]
    s: Float32[Array, " group_size"]
    y: Float32[Array, " group_size"]
    t: Float32[Array, ""]


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
    good = (weights > 0) & (weights < jnp.inf)
    weights = jnp.where(good.all() & (weighted != 0), weights, 1)
    weights = weights / weights.mean()
    if jnp.issubdtype(loads.dtype, jnp.integer):
        total, too_large = exact_sum(counts, axis=0)
        results = jax.vmap(
            lambda own, too_large: solve_integers(
                own, too_large, r2o, weights, n_redundant, weighted, repair
            )
        )(total[experts], too_large[experts].any(axis=(1, 2)))
    else:
        results = jax.vmap(lambda own: solve_floats(own, r2o, weights, n_redundant))(
            counts.sum(axis=0)[experts]
        )
    quota, max_load, bound, overflow, converged = results
    status = (
        jnp.where(overflow, Status.LOAD_OVERFLOW, 0)
        | jnp.where(negative.any(axis=0)[experts].any(axis=(1, 2)), Status.NEGATIVE_LOAD, 0)
        | jnp.where((loads[:, n_logical:] != 0).any(), Status.INVALID_INDEX, 0)
        | jnp.where(misplaced(slots, log2phy, r2o), Status.BAD_PLACEMENT, 0)
        | jnp.where(converged & good.all(), 0, Status.NOT_CONVERGED)
    )
    return quota.reshape(-1), max_load, bound, status.astype(jnp.int32)


def solve_integers(own, too_large, r2o, weights, n_redundant, weighted, repair):
    """Integer quotas, largest load, lower bound, overflow and convergence of one group."""
    dst = inverse(r2o)
    base, base_too_large = exact_sum(own, axis=1)
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    cap = jnp.where(dst == jnp.arange(len(own))[:, None], 0, exact_sum(replicated, axis=1)[0])
    entering = arrived(cap, r2o)
    _, most_too_large = exact_sum(jnp.concatenate([base[:, None], entering], axis=1), axis=1)
    overflow = too_large | base_too_large.any() | most_too_large.any()
    base, cap = jnp.where(overflow, 0, base), jnp.where(overflow, 0, cap)

    best = interior_point(base.astype(jnp.float32), cap.astype(jnp.float32), weights, r2o, dst)
    # The largest float32 that is an int32: converting a larger one is undefined.
    moved = jnp.minimum(jnp.round(jnp.minimum(best.moved, 2147483520.0)).astype(jnp.int32), cap)
    load = base + (arrived(moved, r2o) - moved).sum(axis=1)
    high, low = cut_value(base, cap, best.cut, dst)
    converged = best.largest - best.bound <= CONVERGED_GAP * best.largest
    if weighted:
        if repair:
            # Where the plan at hand is best ⌈t·w_r⌉ tokens are enough for every rank r.
            enough = jnp.minimum(jnp.ceil(best.largest * weights), 2147483520.0).astype(jnp.int32)
            plan = finish_waves(Plan(load - enough, moved, cap[0, 0] * 0), cap, r2o, dst)
            moved, load = plan.moved, plan.load + enough
        max_load = (load.astype(jnp.float32) / weights).max()
        bound = jnp.minimum(provable(high, low, 0, weights, best.cut), max_load)
    else:
        size = jnp.maximum(best.cut.sum(dtype=jnp.int32), 1)
        bound = jnp.maximum(first_target(base, cap), ceil_divide(high, low, size))
        if repair:
            plan = finish_waves(Plan(load, moved, bound), cap, r2o, dst)
            moved, load, bound = plan.moved, plan.load, plan.target
            converged = load.max() <= bound
        max_load = load.max()
    nothing = jnp.asarray(INT32_MAX, max_load.dtype)
    max_load = jnp.where(overflow, nothing, max_load)
    return quotas(own, moved, r2o, n_redundant), max_load, bound, overflow, converged | overflow


def solve_floats(own, r2o, weights, n_redundant):
    """Real quotas, largest load / weight, lower bound, overflow and convergence of one group."""
    dst = inverse(r2o)
    replicated = own[:, :n_redundant].reshape(len(own), -1, r2o.shape[1])
    stays = dst == jnp.arange(len(own))[:, None]
    cap = jnp.where(stays, 0, replicated.sum(axis=1))
    most = (own.sum(axis=1) + arrived(cap, r2o).sum(axis=1)).max()
    overflow = ~(most < jnp.inf)
    own = jnp.where(overflow, 0, own)
    cap = jnp.where(overflow, 0, cap)
    best = interior_point(own.sum(axis=1), cap, weights, r2o, dst)
    quota = quotas(own, best.moved, r2o, n_redundant)
    max_load = (quota.sum(axis=1) / weights).max()

    # For the proof, loads in units of a power of two that are rounded the safe way: sums over one
    # rank stay below 2³⁰, and what is lost is below 2⁻³⁰ of them per expert.
    exponent = 29 - jnp.frexp(jnp.where(overflow, 0, most))[1]
    units = jnp.ldexp(own, exponent)
    base = jnp.floor(units).astype(jnp.int32).sum(axis=1)
    cap = jnp.ceil(units[:, :n_redundant]).astype(jnp.int32).reshape(replicated.shape).sum(axis=1)
    high, low = cut_value(base, jnp.where(stays, 0, cap), best.cut, dst)
    bound = jnp.minimum(provable(high, low, -exponent, weights, best.cut), max_load)
    converged = max_load - bound <= CONVERGED_GAP * max_load
    max_load = jnp.where(overflow, jnp.inf, max_load)
    return quota, max_load, bound, overflow, converged | overflow


def interior_point(
    base: Float32[Array, " group_size"],
    cap: Float32[Array, "group_size n_columns"],
    w: Float32[Array, " group_size"],
    r2o: Int32[Array, "group_size n_columns"],
    dst: Int32[Array, "group_size n_columns"],
) -> Fractional:
    """The best of at most MAX_STEPS + 1 iterates and the best cut; feasible in any case."""
    scale = jnp.maximum(base.sum() / w.sum(), ((base - cap.sum(axis=1)) / w).max())
    unit = jnp.where(scale > 0, 1 / scale, 0)
    base, cap = base * unit, cap * unit
    live = cap > LEAST_EDGE
    n_pairs = len(base) + 2 * live.sum()

    def difference(y):
        return y[dst] - y[:, None]

    def loads(x):
        return base + (arrived(x, r2o) - x).sum(axis=1)

    def plan_of(x):
        plan = jnp.where(live, jnp.clip(x, 0, cap), 0)
        return plan, (loads(plan) / w).max()

    def start() -> Iterate:
        x = jnp.where(live, cap / 2, 0)
        load = loads(x)
        t = (load / w).max() + 0.03
        s = t * w - load
        mu = 1 / (w / s).sum()
        y = mu / s
        # zl and zu of that difference whose product is m².
        m = jnp.where(live, 0.05 * mu / jnp.where(live, x, 1), 0)
        h = difference(y) / 2
        larger = jnp.sqrt(m * m + h * h) + jnp.abs(h)
        smaller = m * m / jnp.where(live, larger, 1)
        zl, zu = jnp.where(h > 0, larger, smaller), jnp.where(h > 0, smaller, larger)
        one = jnp.ones_like(x)
        return Iterate(*(jnp.where(live, a, one) for a in (x, x, zl, zu)), s, y, t)

    def step(v: Iterate) -> Iterate:
        x, xb, zl, zu, s, y, t = v
        rp = t * w - loads(jnp.where(live, x, 0)) - s
        rt = 1 - (w * y).sum()
        rd = difference(y) - (zl - zu)
        H = jnp.where(live, 1 / (zl / x + zu / xb), 0)
        M = factor(H, s / y, dst)

        def direction(rl, ru, rs) -> Iterate:
            g = rl / x - ru / xb - rd
            q = rs / y - rp + (arrived(H * g, r2o) - H * g).sum(axis=1)
            dy, dt = solve_saddle(M, w, q, rt)
            dx = H * (g - difference(dy))
            dzl, dzu = (rl - zl * dx) / x, (ru + zu * dx) / xb
            return Iterate(dx, -dx, dzl, dzu, (rs - s * dy) / y, dy, dt)

        def products(a: Iterate, b: Iterate):
            edges = jnp.where(live, a.x * b.zl + a.xb * b.zu, 0).sum()
            return edges + (a.s * b.y).sum()

        # Predictor: straight at the solution. How far it gets says how much to centre.
        d = direction(-x * zl, -xb * zu, -s * y)
        ap, ad = limits(v, d, live)
        mu = products(v, v) / n_pairs
        mu_affine = (
            mu * (1 - ad) + ((ap - ad) * products(d, v) + ap * ad * products(d, d)) / n_pairs
        )
        c = jnp.minimum(ap, ad)
        sigma = jnp.maximum((mu_affine / mu) ** 3, jnp.maximum(LEAST_SIGMA, 0.3 * (1 - c) ** 2))
        target = jnp.maximum(sigma * mu, LEAST_MU)

        # Corrector: the same matrix, with the predictor's second-order terms.
        d = direction(
            target - x * zl - c * d.x * d.zl,
            target - xb * zu - c * d.xb * d.zu,
            target - s * y - c * d.s * d.y,
        )
        ap, ad = limits(v, d, live, BACK_OFF)
        return Iterate(
            *(jnp.maximum(a + ap * da, LEAST_PRIMAL) for a, da in ((x, d.x), (xb, d.xb))),
            *(jnp.maximum(a + ad * da, LEAST_DUAL) for a, da in ((zl, d.zl), (zu, d.zu))),
            jnp.maximum(s + ap * d.s, LEAST_PRIMAL),
            jnp.maximum(y + ad * d.y, LEAST_DUAL),
            t + ap * d.t,
        )

    def advance(state):
        v, best = state
        v = step(v)
        plan, largest = plan_of(v.x)
        cut, bound = best_cut(base, cap, w, v.y, dst)
        better, higher = largest < best.largest, bound > best.bound
        best = Fractional(
            jnp.where(better, plan, best.moved),
            jnp.where(better, largest, best.largest),
            jnp.where(higher, cut, best.cut),
            jnp.where(higher, bound, best.bound),
            best.steps + 1,
        )
        return v, best

    def unfinished(state):
        _, best = state
        return (best.largest - best.bound > STOP_GAP * best.largest) & (best.steps < MAX_STEPS)

    v = start()
    # From the data, not a fresh constant: under shard_map it must vary over the same axes.
    none = live.sum(dtype=jnp.int32) * 0
    best = Fractional(*plan_of(v.x), *best_cut(base, cap, w, v.y, dst), none)
    _, best = lax.while_loop(unfinished, advance, (v, best))
    return best._replace(
        moved=best.moved * scale, largest=best.largest * scale, bound=best.bound * scale
    )


class Factor(NamedTuple):
    """M = (I − lower) diag(pivot) (I − lower)ᵀ; lower ≥ 0, pivot > 0."""

    lower: Float32[Array, "group_size group_size"]
    pivot: Float32[Array, " group_size"]


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
    o = jnp.where(rank[:, None] == rank, 0, o + o.T)

    def eliminate(k, state):
        o, excess, lower, pivot = state
        row = jnp.where(rank > k, o[k], 0)
        p = excess[k] + row.sum()
        share = row / p
        return (
            o + share[:, None] * row,
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

    M⁻¹ is huge along k, so q is first freed of the part that dt takes up.
    """
    k = solve_factored(M, w)
    wk = w @ k
    k = k / wk
    qm = k @ q
    p = solve_factored(M, q - qm * w)
    r = w @ p - rt
    return p - r * k, qm + r / wk


def limits(v: Iterate, d: Iterate, live: Bool[Array, "group_size n_columns"], back_off=1):
    """The longest primal and dual steps, at most 1, that keep everything positive."""

    def limit(a, da, where=True):
        falls = (da < 0) & where
        return jnp.where(falls, a / jnp.where(falls, -da, 1), jnp.inf).min()

    primal = (limit(v.x, d.x, live), limit(v.xb, d.xb, live), limit(v.s, d.s))
    dual = (limit(v.zl, d.zl, live), limit(v.zu, d.zu, live), limit(v.y, d.y))
    return [
        jnp.minimum(back_off * jnp.minimum(jnp.minimum(a, b), c), 1) for a, b, c in (primal, dual)
    ]


def best_cut(base, cap, w, y, dst) -> tuple[Bool[Array, " group_size"], Float32[Array, ""]]:
    """Of the sets {ranks whose y is at least y_r} the one that proves most, and its bound."""
    inside = y >= y[:, None]
    leaves = inside[:, :, None] & ~inside[:, dst]
    value = (inside * base).sum(axis=1) - (leaves * cap).sum(axis=(1, 2))
    value = value / (inside * w).sum(axis=1)
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


def ceil_divide(high: Array, low: Array, n: Array) -> Int32[Array, ""]:
    """⌈(high · 2¹⁶ + low) / n⌉, at least 0."""
    high, low = high + (low >> 16), low & 0xFFFF
    quotient = high // n
    value = (quotient << 16) + (((high - quotient * n) << 16) + low + n - 1) // n
    return jnp.where(high < 0, 0, value)


def provable(high, low, exponent, w, cut) -> Float32[Array, ""]:
    """(high · 2¹⁶ + low) · 2^exponent / w(cut), less what float32 may have rounded up."""
    total = jnp.maximum(high.astype(jnp.float32) * 65536 + low.astype(jnp.float32), 0)
    weight = jnp.where(cut, w, 0).sum()
    safe = 1 - np.float32(2.0**-23) * (len(w) + 4)
    return jnp.ldexp(total / jnp.where(cut.any(), weight, 1) * safe, exponent)


def inverse(r2o: Int32[Array, "group_size n_columns"]) -> Int32[Array, "group_size n_columns"]:
    """dst: the rank that holds the copies of a rank's column."""
    rank = jnp.arange(r2o.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(r2o).at[r2o, jnp.arange(r2o.shape[1])].set(rank)
