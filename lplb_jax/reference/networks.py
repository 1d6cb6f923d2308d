"""The interior point's flows: tokens along a topology's edges, or between an expert's hosts.

Along edges, x and the remainder xb = cap − x have multipliers zl and zu with zl − zu = y_v − y_u.
Between hosts, every expert's x_er sum to its load and z_er = y_r − λ_e for some λ_e: an expert is a
clique of its hosts, and with h = x/z its part of M is diag(h) − h hᵀ/Σh, whose off-diagonals
−h_r h_q/Σh are ≤ 0. An edge is a clique of two, of conductance 1 / (zl/x + zu/xb).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int32

from lplb_jax.reference.interior_point import Iterate, Network
from lplb_jax.reference.solver import arrived

LEAST_EDGE = np.float32(1e-9)  # Of a rank's mean load: edges that move less are ignored.


@dataclasses.dataclass(frozen=True)
class EdgeNetwork(Network):
    """Edges of a topology. `x[0]` moves along them and `x[1]` stays."""

    base: Float32[Array, " group_size"]
    cap: Float32[Array, "group_size n_columns"]
    w: Float32[Array, " group_size"]
    r2o: Int32[Array, "group_size n_columns"]
    dst: Int32[Array, "group_size n_columns"]

    @property
    def counts(self) -> Bool[Array, "group_size n_columns"]:
        """The edges that are not ignored."""
        return self.cap > LEAST_EDGE * self.w[:, None]

    @property
    def live(self) -> Bool[Array, "2 group_size n_columns"]:
        return jnp.stack([self.counts, self.counts])

    @property
    def most(self) -> Float32[Array, "2 group_size n_columns"]:
        return jnp.stack([self.cap, self.cap])

    def loads(self, x: Array) -> Float32[Array, " group_size"]:
        return self.base + self.inflow(jnp.where(self.counts, x, 0))

    def inflow(self, x: Array) -> Float32[Array, " group_size"]:
        return net_inflow(x[0], self.r2o)

    def first_plan(self) -> Array:
        """Moves half of everything."""
        half = jnp.where(self.counts, self.cap / 2, 0)
        return jnp.stack([half, half])

    def first_duals(self, y: Array, m: Array) -> Array:
        """zl and zu with the difference that y requires and the product m²."""
        m = m[0]
        h = self.along(y) / 2
        larger = jnp.sqrt(m * m + h * h) + jnp.abs(h)
        smaller = m * m / jnp.where(self.counts, larger, 1)
        return jnp.stack([jnp.where(h > 0, larger, smaller), jnp.where(h > 0, smaller, larger)])

    def legal(self, x: Array) -> Array:
        moved = jnp.minimum(x[0], self.cap)
        moved = jnp.where(self.counts & (moved > 0), moved, 0)
        return jnp.stack([moved, self.cap - moved])

    def best_cut(self, y: Array) -> tuple[Bool[Array, " group_size"], Float32[Array, ""]]:
        inside = y[None, :] >= y[:, None]
        leaves = inside[:, :, None] & ~inside[:, self.dst]
        value = jnp.where(inside, self.base[None], 0).sum(axis=1)
        value = value - jnp.where(leaves, self.cap[None], 0).sum(axis=(1, 2))
        value = value / jnp.where(inside, self.w[None], 0).sum(axis=1)
        best = value.argmax()
        return inside[best], value[best]

    def conductance(self, v: Iterate) -> Array:
        return jnp.where(self.counts, 1 / (v.z / v.x).sum(axis=0), 0)

    def laplacian(self, conductance: Array) -> Float32[Array, "group_size group_size"]:
        n = len(self.base)
        rank = jnp.arange(n)[:, None]
        o = jnp.zeros((n, n), jnp.float32).at[rank, self.dst].add(conductance)
        return jnp.where(rank == rank.T, 0, o + o.T)

    def drive(self, v: Iterate, lack: Array, conductance: Array) -> Array:
        misfit = self.along(v.y) - (v.z[0] - v.z[1])
        return lack[0] / v.x[0] - lack[1] / v.x[1] - misfit

    def against(self, dy: Array, conductance: Array) -> Array:
        return self.along(dy)

    def flow(self, drive: Array, conductance: Array) -> Array:
        moves = conductance * drive
        return jnp.stack([moves, -moves])

    def along(self, y: Float32[Array, " group_size"]) -> Float32[Array, "group_size n_columns"]:
        """y_v − y_u of every edge."""
        return y[self.dst] - y[:, None]


@dataclasses.dataclass(frozen=True)
class HostNetwork(Network):
    """Experts and their hosts; `x[e, r]` of expert e are on rank r.

    Differences are taken to the expert's host with the largest conductance, whose flow is minus the
    sum of the others'. This way float32 keeps the small flows of the others.
    """

    total: Float32[Array, " n_logical"]
    base: Float32[Array, " ep_size"]
    hosts: Bool[Array, "n_logical ep_size"]
    w: Float32[Array, " ep_size"]

    @property
    def live(self) -> Bool[Array, "n_logical ep_size"]:
        """Cells of experts with several hosts and a load that counts."""
        several = self.hosts.sum(axis=1) > 1
        fastest = jnp.where(self.hosts, self.w, 0).max(axis=1)
        return self.hosts & (several & (self.total > LEAST_EDGE * fastest))[:, None]

    @property
    def most(self) -> Float32[Array, "n_logical 1"]:
        return self.total[:, None]

    @property
    def fixed(self) -> Float32[Array, "n_logical ep_size"]:
        """The other experts' shares: each is entirely on the first of its fastest hosts."""
        fastest = jnp.where(self.hosts, self.w, 0).argmax(axis=1)
        here = jnp.arange(len(self.w)) == fastest[:, None]
        return (here & self.hosts & ~self.live.any(axis=1)[:, None]).astype(jnp.float32)

    def shares(self, x: Array) -> Float32[Array, "n_logical ep_size"]:
        """Every host's share of each expert's load."""
        x = jnp.where(self.live & (x > 0), x, 0)
        sum_of_expert = x.sum(axis=1, keepdims=True)
        return jnp.where(self.live, x / jnp.where(self.live, sum_of_expert, 1), self.fixed)

    def loads(self, x: Array) -> Float32[Array, " ep_size"]:
        fixed = self.base + (self.fixed * self.total[:, None]).sum(axis=0)
        return fixed + self.inflow(jnp.where(self.live, x, 0))

    def inflow(self, x: Array) -> Float32[Array, " ep_size"]:
        return x.sum(axis=0)

    def first_plan(self) -> Array:
        """Equal shares on all hosts."""
        n_hosts = self.hosts.sum(axis=1, keepdims=True, dtype=jnp.int32)
        return jnp.where(self.live, self.total[:, None] / jnp.maximum(n_hosts, 1), 0)

    def first_duals(self, y: Array, m: Array) -> Array:
        """m at the least y, and larger elsewhere by as much as y is."""
        least = jnp.where(self.live, y, jnp.inf).min(axis=1, keepdims=True)
        return jnp.where(self.live, y - least + m, 0)

    def legal(self, x: Array) -> Array:
        return self.shares(x) * jnp.where(self.live, self.total[:, None], 0)

    def best_cut(self, y: Array) -> tuple[Bool[Array, " ep_size"], Float32[Array, ""]]:
        inside = y[None, :] >= y[:, None]
        least = jnp.where(self.hosts, y, jnp.inf).min(axis=1)
        value = jnp.where(least >= y[:, None], self.total[None], 0).sum(axis=1)
        value = (value + jnp.where(inside, self.base[None], 0).sum(axis=1)) / jnp.where(
            inside, self.w[None], 0
        ).sum(axis=1)
        best = value.argmax()
        return inside[best], value[best]

    def conductance(self, v: Iterate) -> Array:
        return jnp.where(self.live, v.x / v.z, 0)

    def laplacian(self, conductance: Array) -> Float32[Array, "ep_size ep_size"]:
        o = jnp.matmul(conductance.T, self._weights(conductance), precision="highest")
        rank = jnp.arange(len(self.w))
        return jnp.where(rank[:, None] == rank, 0, o)

    def drive(self, v: Iterate, lack: Array, conductance: Array) -> Array:
        misfit = self.against(v.y, conductance) - self._relative(v.z, conductance)
        return self._relative(lack / v.x, conductance) - misfit

    def against(self, dy: Array, conductance: Array) -> Array:
        return self._relative(jnp.broadcast_to(dy, self.hosts.shape), conductance)

    def flow(self, drive: Array, conductance: Array) -> Array:
        mean = (self._weights(conductance) * drive).sum(axis=1, keepdims=True)
        others = jnp.where(self._is_main(conductance), 0, conductance * (drive - mean))
        rest = -others.sum(axis=1, keepdims=True)
        return jnp.where(self._is_main(conductance), rest, others)

    def _weights(self, conductance: Array) -> Array:
        """h/Σh."""
        all_of_expert = conductance.sum(axis=1, keepdims=True)
        return jnp.where(self.live, conductance / jnp.where(self.live, all_of_expert, 1), 0)

    def _is_main(self, conductance: Array) -> Bool[Array, "n_logical ep_size"]:
        """Whether a host is the expert's host with the largest conductance."""
        return jnp.arange(len(self.w)) == conductance.argmax(axis=1, keepdims=True)

    def _relative(self, values: Array, conductance: Array) -> Array:
        """Differences to the value at the host with the largest conductance."""
        main = jnp.where(self._is_main(conductance), values, 0).sum(axis=1, keepdims=True)
        return jnp.where(self.live, values - main, 0)


def net_inflow(flow: Array, r2o: Int32[Array, "group_size n_columns"]) -> Array:
    """The flow into every rank minus the flow out of it."""
    return (arrived(flow, r2o) - flow).sum(axis=1, dtype=flow.dtype)
