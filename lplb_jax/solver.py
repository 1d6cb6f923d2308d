"""Step 3: how many tokens every replica serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lplb_jax import _native, reference
from lplb_jax._problem import Problem, check_loads, check_problem, check_solver
from lplb_jax.placement import Placement


class Split(NamedTuple):
    """How every expert's tokens are split over its slots, and the proof that it is optimal.

    Attributes:
      quota: int32 `[n_physical]`, tokens that every physical slot serves, over all source ranks.
        The quotas of an expert's slots sum to its load.
      max_load: int32 `[n_groups]`, tokens on the busiest rank of every group.
      lower_bound: int32 `[n_groups]`, what no split can go below: ⌈(tokens that cannot leave S) /
        |S|⌉ of the set S of ranks for which it is largest. The exact solver always reaches it.
      status: int32 `[n_groups]`, bits of `lplb_jax.Status`; 0 where all is well.
    """

    quota: jax.Array
    max_load: jax.Array
    lower_bound: jax.Array
    status: jax.Array


def solve(
    loads: Any, r2o: Any, *, placement: Placement | None = None, solver: str = "auto"
) -> Split:
    """Splits every expert's tokens over its slots so that the busiest rank of each group has least.

    Args:
      loads: int32 tokens per expert, 0 … 2³¹ − 1, `[n_logical]` or, by source rank,
        `[ep_size, n_logical]`. Negative loads count as 0 and set a status bit.
      r2o: static topology `[group_size, n_columns]`, see `lplb_jax.topologies`. Each group of
        group_size consecutive ranks is solved on its own.
      placement: where the experts are; None for the given order with one redundant slot per column
        (and, if `loads` is `[n_logical]`, a single group).
      solver: "exact", integer waves on the replica graph; "auto" is the same.

    Returns:
      A `Split`. It is equal bit for bit on every backend.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Source: phased maximum flow with Newton steps on the cut ratio (see `lplb_jax.reference`); the
    problem is DeepSeek LPLB's.

    >>> split = solve(jnp.array([9, 1, 1, 1], jnp.int32), topologies.ring(2))
    >>> split.quota.tolist()  # rank 0: experts 0 and 1 and a copy of 2; rank 1: 2, 3 and one of 0
    [5, 1, 0, 1, 1, 4]
    >>> split.max_load.tolist(), split.lower_bound.tolist()
    ([6], [6])
    """
    check_solver(solver)
    loads = check_loads(loads)
    problem = check_problem(loads, r2o, placement, axis_name=None)
    return split_loads(loads, problem)


def split_loads(loads: jax.Array, problem: Problem) -> Split:
    """`solve` of checked arguments; rows may carry a last place for ids that name no expert."""
    placement = problem.placement
    rows = loads.reshape(-1, loads.shape[-1])
    operands = (rows, placement.phy2log, placement.log2phy, problem.r2o)
    return Split(*_native.call("lplb_solve", reference.solve, *operands, ep_size=problem.ep_size))
