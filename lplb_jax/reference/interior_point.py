"""The interior point's iteration, for all kinds of networks: see `ipm` for the problem.

A primal–dual predictor–corrector (Mehrotra). Each rank has a slack s = t·w − L and a multiplier
y ≥ 0 with wᵀy = 1; the flow in the network is x > 0, with multipliers z > 0. The distance from a
solution is measured by the residuals and by what the products x·z and s·y lack to their targets. A
Newton step dx, …, dt takes all of them to 0. Eliminating all but dy and dt leaves the G × G system

    M dy + w dt = q,   wᵀdy = rt,   M = diag(s/y) + a graph Laplacian

which is almost singular near the solution, where only differences of dy between ranks matter. Two
safeguards make float32 sufficient: `eliminate` never subtracts, and `solve_saddle` removes the mean
of the right-hand side.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32

MAX_STEPS = 16  # 8 suffice on sparse topologies; with 30 edges per rank, 12 were seen.
STOP_GAP = np.float32(5e-5)  # Of the largest load.
START_SLACK = np.float32(0.03)  # t above the largest load of the first plan.
START_PRODUCT = np.float32(0.05)  # x·√(zl·zu) of the first iterate, relative to its s·y.
BACK_OFF = np.float32(0.99)  # The fraction of the way to the boundary that a step takes.
LEAST_SIGMA = np.float32(0.01)  # The corrector's target is at least this much of the mean product,
CAUTION = np.float32(0.3)  # and this much of it, times the square of the predictor's shortfall.
LEAST_MU = np.float32(3e-8)
LEAST_PRIMAL = np.float32(1e-12)
LEAST_SHARE = np.float32(1e-3)  # Of what may move, if that is below LEAST_PRIMAL.
LEAST_DUAL = np.float32(1e-20)


class Network(abc.ABC):
    """One group as the iteration sees it, scaled to a largest load / weight of about 1.

    All flows have one shape, and so have all potentials that drive them. `conductance` is the flow
    per unit of potential.
    """

    w: Float32[Array, " n_ranks"]  # The ranks' weights.

    @property
    @abc.abstractmethod
    def live(self) -> Bool[Array, "*moving"]:
        """Where flow is possible; everything else moves nothing."""

    @property
    @abc.abstractmethod
    def most(self) -> Float32[Array, "*room"]:
        """The most that may move."""

    @abc.abstractmethod
    def loads(self, x: Array) -> Float32[Array, " n_ranks"]:
        """The ranks' loads."""

    @abc.abstractmethod
    def inflow(self, x: Array) -> Float32[Array, " n_ranks"]:
        """The part of the loads due to x, where all of x counts."""

    @abc.abstractmethod
    def first_plan(self) -> Array:
        """x in the middle of the feasible range."""

    @abc.abstractmethod
    def first_duals(self, y: Array, m: Array) -> Array:
        """z that satisfies its equation with y exactly, about m unless y requires more."""

    @abc.abstractmethod
    def legal(self, x: Array) -> Array:
        """A feasible plan near x; 0 where nothing is live."""

    @abc.abstractmethod
    def best_cut(self, y: Array) -> tuple[Bool[Array, " n_ranks"], Float32[Array, ""]]:
        """The set with the highest bound among {ranks whose y is at least y_r}, and its bound."""

    @abc.abstractmethod
    def conductance(self, v: Iterate) -> Array:
        """The flow per unit of potential."""

    @abc.abstractmethod
    def laplacian(self, conductance: Array) -> Float32[Array, "n_ranks n_ranks"]:
        """The off-diagonals of M, negated; 0 on the diagonal."""

    @abc.abstractmethod
    def drive(self, v: Iterate, lack: Array, conductance: Array) -> Array:
        """The potential that moves x: the products' lack, and z's residual with y."""

    @abc.abstractmethod
    def against(self, dy: Array, conductance: Array) -> Array:
        """The decrease of the potential if y changes by dy."""

    @abc.abstractmethod
    def flow(self, drive: Array, conductance: Array) -> Array:
        """The dx that `drive` causes."""


class Fractional(NamedTuple):
    """The interior point's result.

    `plan` is feasible, `largest` its largest load / weight, `cut` the ranks of the best cut,
    `bound` that cut's value in float32, which proves nothing, and `steps` the number of steps.
    """

    plan: Float32[Array, "*moving"]
    largest: Float32[Array, ""]
    cut: Bool[Array, " n_ranks"]
    bound: Float32[Array, ""]
    steps: Int32[Array, ""]


class Iterate(NamedTuple):
    """Primal and dual variables, all positive except t; or a step of them."""

    x: Float32[Array, "*moving"]
    z: Float32[Array, "*moving"]
    s: Float32[Array, " n_ranks"]
    y: Float32[Array, " n_ranks"]
    t: Float32[Array, ""]


class Lack(NamedTuple):
    """What the products lack to their targets."""

    xz: Float32[Array, "*moving"]
    sy: Float32[Array, " n_ranks"]


class Factor(NamedTuple):
    """M = (I − lower) diag(pivot) (I − lower)ᵀ; lower ≥ 0, pivot > 0."""

    lower: Float32[Array, "n_ranks n_ranks"]
    pivot: Float32[Array, " n_ranks"]


def iterate(network: Network) -> Fractional:
    """The best of at most MAX_STEPS + 1 iterates and the best cut; always feasible."""

    def advance(state):
        v, best = state
        v = step(network, v)
        return v, better_of(best, judge(network, v))

    def unfinished(state):
        _, best = state
        return (best.largest - best.bound > STOP_GAP * best.largest) & (best.steps < MAX_STEPS)

    v = start(network)
    _, best = lax.while_loop(unfinished, advance, (v, judge(network, v)))
    return best


def judge(network: Network, v: Iterate) -> Fractional:
    """The plan of an iterate, made feasible, and the best of its cuts; `steps` is 0."""
    plan = network.legal(v.x)
    largest = (network.loads(plan) / network.w).max()
    cut, bound = network.best_cut(v.y)
    # Derived from the data, not a constant: under shard_map it must vary over the same axes.
    return Fractional(plan, largest, cut, bound, network.live.sum(dtype=jnp.int32) & 0)


def better_of(best: Fractional, new: Fractional) -> Fractional:
    """The better plan and the better cut, one step later. NaN is never better."""
    better, higher = new.largest < best.largest, new.bound > best.bound
    return Fractional(
        jnp.where(better, new.plan, best.plan),
        jnp.where(better, new.largest, best.largest),
        jnp.where(higher, new.cut, best.cut),
        jnp.where(higher, new.bound, best.bound),
        best.steps + 1,
    )


def start(network: Network) -> Iterate:
    """The first plan, and y centered for it."""
    live, x = network.live, network.first_plan()
    load = network.loads(x)
    t = (load / network.w).max() + START_SLACK
    s = t * network.w - load
    mu = 1 / (network.w / s).sum()
    y = mu / s
    m = jnp.where(live, START_PRODUCT * mu / jnp.where(live, x, 1), 0)
    x, z = (jnp.where(live, a, 1) for a in (x, network.first_duals(y, m)))
    return Iterate(x, z, s, y, t)


def step(network: Network, v: Iterate) -> Iterate:
    """One predictor and corrector."""
    H = network.conductance(v)
    M = eliminate(network.laplacian(H), v.s / v.y)

    # Predictor: straight at the solution. Its step length determines the centering.
    lack = Lack(-v.x * v.z, -v.s * v.y)
    d = direction(network, v, H, M, lack)
    primal, dual = step_lengths(v, d, network.live, np.float32(1))
    n_pairs = len(network.w) + network.live.sum(dtype=jnp.int32).astype(jnp.float32)
    mu = products(network, v, v) / n_pairs
    first, second = products(network, d, v), products(network, d, d)
    affine = mu * (1 - dual) + ((primal - dual) * first + primal * dual * second) / n_pairs
    reach = jnp.minimum(primal, dual)
    target = target_mu(mu, affine, reach)

    # Corrector: the same matrix, with the predictor's second-order terms.
    lack = Lack(target + lack.xz - reach * d.x * d.z, target + lack.sy - reach * d.s * d.y)
    d = direction(network, v, H, M, lack)
    primal, dual = step_lengths(v, d, network.live, BACK_OFF)
    least_x = jnp.minimum(LEAST_PRIMAL, LEAST_SHARE * network.most)
    least_s = LEAST_PRIMAL * jnp.minimum(network.w, 1)
    return Iterate(
        jnp.maximum(v.x + primal * d.x, least_x),
        jnp.maximum(v.z + dual * d.z, LEAST_DUAL),
        jnp.maximum(v.s + primal * d.s, least_s),
        jnp.maximum(v.y + dual * d.y, LEAST_DUAL),
        v.t + primal * d.t,
    )


def direction(network: Network, v: Iterate, H: Array, M: Factor, lack: Lack) -> Iterate:
    """The Newton step from v."""
    rp = v.t * network.w - network.loads(v.x) - v.s
    rt = 1 - (network.w * v.y).sum()
    drive = network.drive(v, lack.xz, H)
    q = lack.sy / v.y - rp + network.inflow(network.flow(drive, H))
    dy, dt = solve_saddle(M, network.w, q, rt)
    dx = network.flow(drive - network.against(dy, H), H)
    return Iterate(dx, (lack.xz - v.z * dx) / v.x, (lack.sy - v.s * dy) / v.y, dy, dt)


def products(network: Network, a: Iterate, b: Iterate) -> Float32[Array, ""]:
    """The sum of a's primal values times b's dual values."""
    return jnp.where(network.live, a.x * b.z, 0).sum() + (a.s * b.y).sum()


def target_mu(mu, affine, reach) -> Float32[Array, ""]:
    """The corrector's target for every product.

    Their mean is mu now, and would be `affine` after `reach` times the predictor's step.
    """
    sigma = jnp.maximum(LEAST_SIGMA, CAUTION * (1 - reach) ** 2)
    return jnp.maximum(jnp.maximum((affine / mu) ** 3, sigma) * mu, LEAST_MU)


def step_lengths(
    v: Iterate, d: Iterate, live: Bool[Array, "*moving"], back_off: np.float32
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The longest primal and dual steps, at most 1, that keep everything positive."""

    def limit(a, da, where: Any = True):
        falls = (da < 0) & where
        return jnp.where(falls, a / jnp.where(falls, -da, 1), jnp.inf).min()

    def shortest(*limits):
        return jnp.minimum(back_off * jnp.stack(limits).min(), 1)

    return (
        shortest(limit(v.x, d.x, live), limit(v.s, d.s)),
        shortest(limit(v.z, d.z, live), limit(v.y, d.y)),
    )


def eliminate(o: Float32[Array, "n_ranks n_ranks"], excess: Float32[Array, " n_ranks"]) -> Factor:
    """Eliminates without a single subtraction.

    M's diagonal is never stored: a row is its off-diagonals −o ≤ 0 and its excess, the diagonal
    minus the sum of o. Elimination keeps this form, and all digits.
    """
    n = len(excess)
    rank = jnp.arange(n)

    def one(k, state):
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

    _, _, lower, pivot = lax.fori_loop(0, n, one, (o, excess, o * 0, excess))
    return Factor(lower, pivot)


def solve_factored(M: Factor, q: Float32[Array, " n_ranks"]) -> Float32[Array, " n_ranks"]:
    """M⁻¹q, by substitution."""
    n = len(q)
    # Varies like M, so that under shard_map the loop's carry keeps its type.
    q = q + 0 * M.pivot
    q = lax.fori_loop(0, n, lambda k, q: q + M.lower[:, k] * q[k], q) / M.pivot
    return lax.fori_loop(0, n, lambda i, q: q.at[n - 1 - i].add(M.lower[:, n - 1 - i] @ q), q)


def solve_saddle(
    M: Factor, w: Float32[Array, " n_ranks"], q: Float32[Array, " n_ranks"], rt: Array
) -> tuple[Float32[Array, " n_ranks"], Float32[Array, ""]]:
    """dy, dt of M dy + w dt = q, wᵀdy = rt.

    M⁻¹ is huge along k = M⁻¹w, so q's mean is removed first; dt absorbs it.
    """
    k = solve_factored(M, w)
    wk = w @ k
    k = k / wk
    mean = k @ q
    p = solve_factored(M, q - mean * w)
    rest = w @ p - rt
    return p - rest * k, mean + rest / wk
