"""Traffic: what a layer reports about a batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import metrics
from lplb_jax._axes import check_axis, varying_over
from lplb_jax._problem import Problem
from lplb_jax.moe.plan import Plan
from lplb_jax.solver import Split
from lplb_jax.status import Status


class Traffic(NamedTuple):
    """Statistics of one call of a layer; equal on all ranks.

    Attributes:
      slot_loads: int32 `[n_physical]`, rows for every slot from all sources.
      capacity: int32 scalar, the rows that fit on a rank.
      overflow: int32 scalar, rows of all ranks that did not fit and were dropped; 0 is good.
      status: int32 `[n_groups]`, bits of `lplb_jax.Status`; 0 is good.
      lower_bound: int32 `[n_groups]`, the least load of a group's busiest rank that any routing
        over these replicas can reach, in tiles with `tile`; 0 if `balance` is not "lplb".
      phy2log: int32 `[n_physical]`, the expert of every slot, −1 if empty: the placement's, or as
        chosen with copies="batch". Filled slots beyond n_logical are copies, whose weights are
        fetched.
      expert_loads: int32 `[n_logical]`, rows for every expert, for `LoadHistory.update`.
      copies: copies whose weights each rank sends and receives for this batch, and the rows that
        the busiest rank saves; `metrics.copy_times` converts both to seconds. 0 if none
        are fetched.
    """

    slot_loads: jax.Array
    capacity: jax.Array
    overflow: jax.Array
    status: jax.Array
    lower_bound: jax.Array
    phy2log: jax.Array
    expert_loads: jax.Array
    copies: metrics.CopyTraffic | None = None

    def reduced(self, axis_name: Any) -> Traffic:
        """Reduces over another mesh axis, such as "data", whose slices each run the layer.

        Call it inside `jax.shard_map`. The result is the same on all ranks, so its out_specs are
        `P()`. Works on stacked traffic of several layers as well.

        Args:
          axis_name: the other axis (or a tuple of axes) over which tokens are sharded.

        Returns:
          Rows (`slot_loads`, `overflow`, `expert_loads`) are summed over the slices, `status`
          has all their bits, `capacity`, `lower_bound` and the numbers of `copies` are maxima
          (`rows_saved` a minimum), and `phy2log` is −1 where copies="batch" chose different
          experts.

        >>> spec = jax.sharding.PartitionSpec("data")
        >>> mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
        >>> def of_slice(loads):
        ...     one = jnp.int32(1)
        ...     return Traffic(loads, one, one, loads[:1] * 0, loads[:1], loads, loads)
        >>> run = jax.shard_map(
        ...     lambda loads: of_slice(loads).reduced("data"),
        ...     mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec(),
        ... )
        >>> traffic = run(jnp.array([3, 1, 3, 2]))
        >>> traffic.slot_loads.tolist(), traffic.lower_bound.tolist(), traffic.phy2log.tolist()
        ([6, 3], [3], [3, -1])
        """
        check_axis(axis_name)
        of_slices = jax.tree.map(lambda leaf: varying_over(leaf, axis_name), self)
        total, most = (functools.partial(of, axis_name=axis_name) for of in (lax.psum, lax.pmax))
        bits = [most(of_slices.status & bit) for bit in map(int, Status)]
        least = -most(-of_slices.phy2log)
        copies = of_slices.copies
        if copies is not None:
            copies = jax.tree.map(most, copies._replace(rows_saved=-copies.rows_saved))
            copies = copies._replace(rows_saved=-copies.rows_saved)
        return Traffic(
            slot_loads=total(of_slices.slot_loads),
            capacity=most(of_slices.capacity),
            overflow=total(of_slices.overflow),
            status=sum(bits[1:], bits[0]),
            lower_bound=most(of_slices.lower_bound),
            phy2log=jnp.where(most(of_slices.phy2log) == least, least, -1),
            expert_loads=total(of_slices.expert_loads),
            copies=copies,
        )


def traffic_of(plan: Plan, split: Split, problem: Problem, *, fetches: bool) -> Traffic:
    """The statistics of a batch; no copies travel unless the layer fetches them."""
    loads, placement = plan.slot_loads, problem.placement
    return Traffic(
        loads,
        jnp.int32(plan.capacity),
        plan.overflow,
        split.status,
        split.lower_bound,
        jnp.asarray(placement.phy2log),
        metrics.expert_loads(loads, placement),
        _copy_traffic(loads, problem, fetches),
    )


def _copy_traffic(slot_loads: jax.Array, problem: Problem, fetches: bool) -> metrics.CopyTraffic:
    along = problem.r2o if problem.along_topology else None
    placement = dataclasses.replace(problem.placement, topology=along)
    found = metrics.copy_traffic(slot_loads, placement, n_nodes=problem.n_nodes)
    return found if fetches else jax.tree.map(jnp.zeros_like, found)
