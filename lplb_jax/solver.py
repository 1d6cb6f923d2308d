"""Step 3: how many tokens every replica serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from lplb_jax import _native, reference
from lplb_jax._problem import (
    Problem,
    check_factor,
    check_loads,
    check_problem,
    check_weights,
    choose_solver,
)
from lplb_jax.placement import Placement


class Split(NamedTuple):
    """How every expert's tokens are split over its slots, and what is proven about it.

    Attributes:
      quota: int32 `[n_physical]`, tokens that every physical slot serves, over all source ranks.
        The quotas of an expert's slots sum to its load. float32 where the loads are.
      max_load: int32 `[n_groups]`, tokens on the busiest rank of every group. float32 where the
        loads are or the ranks are weighted: the largest load / weight, of weights with mean 1.
      lower_bound: `[n_groups]`, what no split can go below, of max_load's type. In tokens:
        ⌈(tokens that cannot leave S) / |S|⌉ of the set S of ranks for which it is largest; with
        weights, the least load / weight at which S may have that many. The exact solver always
        reaches it, and so does the interior point's repair (with weights to float32's rounding).
      status: int32 `[n_groups]`, bits of `lplb_jax.Status`; 0 means clean input and `max_load` at
        most 1e-4 of itself above `lower_bound`.
    """

    quota: jax.Array
    max_load: jax.Array
    lower_bound: jax.Array
    status: jax.Array


def solve(
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    solver: str = "auto",
    rank_weights: Any = None,
    repair: bool = True,
    factor: str = "elimination",
) -> Split:
    """Splits every expert's tokens over its slots so that the busiest rank of each group has least.

    Args:
      loads: int32 tokens per expert, 0 … 2³¹ − 1, `[n_logical]` or, by source rank,
        `[ep_size, n_logical]`. Negative loads count as 0 and set a status bit. float32 loads of
        any unit go to the interior point; NaN counts as 0, infinity is an overflow.
      r2o: static topology `[group_size, n_columns]`, see `lplb_jax.topologies`; None for the
        placement's. Each group of group_size consecutive ranks is solved on its own. If the
        placement carries none either, all ranks are one group, and an expert's tokens may go to any
        of its slots.
      placement: where the experts are; None for the given order with one redundant slot per column
        (and, if `loads` is `[n_logical]`, a single group).
      solver: "exact", integer waves on the replica graph; "ipm", a float32 interior point; "auto",
        exact for int32 loads without weights, else ipm.
      rank_weights: float `[group_size]`, positive: how fast every rank of a group is, in any unit.
        Then the largest load / weight is what is made small. Weights below 2⁻⁴⁰ of the largest
        count as that, and set a status bit. None: all ranks are equal.
      repair: what the interior point does with int32 loads after rounding its plan to tokens. True:
        integer waves end at the optimum in whole tokens, with weights, too. False: as rounded,
        which sets a status bit where it costs more than 1e-4.
      factor: how the interior point factors its matrix: "elimination", without subtraction, or
        "cusolverdx", NVIDIA's Cholesky, on GPUs of compute capability 9.0 and where the library was
        built with it. The latter is slower and does not always converge (see docs/solvers.md);
        status tells.

    Returns:
      A `Split`. The exact solver's is equal bit for bit on every backend.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Source: phased maximum flow with Newton steps on the cut ratio, and Mehrotra's predictor and
    corrector (see `lplb_jax.reference`); the problem is DeepSeek LPLB's.

    >>> split = solve(jnp.array([9, 1, 1, 1], jnp.int32), topologies.ring(2))
    >>> split.quota.tolist()  # rank 0: experts 0 and 1 and a copy of 2; rank 1: 2, 3 and one of 0
    [5, 1, 0, 1, 1, 4]
    >>> split.max_load.tolist(), split.lower_bound.tolist()
    ([6], [6])
    """
    loads = check_loads(loads, floats=True)
    method = choose_solver(solver, loads, rank_weights)
    problem = check_problem(loads, r2o, placement, axis_name=None)
    weights = check_weights(rank_weights, len(problem.r2o))
    cusolverdx = check_factor(factor, method, problem)
    return solve_checked(loads, problem, method, weights, repair, cusolverdx)


def solve_checked(
    loads: jax.Array,
    problem: Problem,
    method: str = "exact",
    weights: jax.Array | None = None,
    repair: bool = True,
    cusolverdx: bool = False,
) -> Split:
    """`solve` of checked arguments; rows may carry a last place for ids that name no expert."""
    placement = problem.placement
    rows = loads.reshape(-1, loads.shape[-1])
    operands = (rows, placement.phy2log, placement.log2phy, problem.r2o)
    if method == "exact":
        split = _native.call("lplb_solve", reference.solve, *operands, ep_size=problem.ep_size)
    else:
        split = _native.call(
            "lplb_ipm",
            reference.ipm,
            *operands,
            np.ones(len(problem.r2o), np.float32) if weights is None else weights,
            ep_size=problem.ep_size,
            weighted=int(weights is not None),
            repair=int(repair),
            cusolverdx=int(cusolverdx),
            only_cuda="factor: expected 'elimination' where the program does not run on an NVIDIA "
            "GPU, got 'cusolverdx'"
            if cusolverdx
            else None,
        )
    return Split(*split)
