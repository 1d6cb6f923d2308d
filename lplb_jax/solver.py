"""Step 3: how many tokens every replica serves."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import jax
import numpy as np

from lplb_jax import _native, reference
from lplb_jax._problem import (
    NO_COSTS,
    Costs,
    Factor,
    Problem,
    Solver,
    check_costs,
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
      max_load: int32 `[n_groups]`, tokens on the busiest rank of every group, with what it has
        anyway (`base_load`). float32 where the loads are or the ranks are weighted: the largest
        load / weight, of weights with mean 1.
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


class TileSplit(NamedTuple):
    """A `Split` where slots cost tiles, ⌈quota / tile⌉ each.

    Attributes:
      quota: int32 `[n_physical]`, as in `Split`: tokens.
      max_load: int32 `[n_groups]`, tiles of the busiest rank of each group, `base_load` included.
      lower_bound: int32 `[n_groups]`, the least possible number of tiles; always reached.
      status: int32 `[n_groups]`, as in `Split`.
      max_tokens: int32 `[n_groups]`, tokens on the rank of every group that has most, the least
        possible with every slot's number of tiles. A tile of `base_load` counts as `tile` tokens.
    """

    quota: jax.Array
    max_load: jax.Array
    lower_bound: jax.Array
    status: jax.Array
    max_tokens: jax.Array


@overload
def solve(
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    repair: bool = True,
    factor: Factor = "elimination",
    tile: None = None,
    base_load: Any = None,
) -> Split: ...


@overload
def solve(
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    repair: bool = True,
    factor: Factor = "elimination",
    tile: int,
    base_load: Any = None,
) -> TileSplit: ...


@overload
def solve(
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    repair: bool = True,
    factor: Factor = "elimination",
    tile: int | None,
    base_load: Any = None,
) -> Split | TileSplit: ...


def solve(
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    repair: bool = True,
    factor: Factor = "elimination",
    tile: int | None = None,
    base_load: Any = None,
) -> Split | TileSplit:
    """Splits every expert's tokens over its slots to minimize each group's largest rank load.

    Args:
      loads: int32 tokens per expert, 0 … 2³¹ − 1, `[n_logical]` or, by source rank,
        `[ep_size, n_logical]`. Negative loads count as 0 and set a status bit. float32 loads of
        any unit go to the interior point; NaN counts as 0, infinity is an overflow.
      r2o: static topology `[group_size, n_columns]`, see `lplb_jax.topologies`; None for the
        placement's. Each group of group_size consecutive ranks is solved separately. If the
        placement carries none either, all ranks are one group, and an expert's tokens may go to any
        of its slots.
      placement: where the experts are; None for the given order with one redundant slot per column
        (and, if `loads` is `[n_logical]`, a single group).
      solver: "exact", integer waves on the replica graph; "ipm", a float32 interior point; "auto",
        exact for int32 loads without weights, otherwise ipm.
      rank_weights: float `[group_size]`, positive: the speed of each rank of a group, in any unit.
        Then the largest load / weight is minimized. Weights below 2⁻⁴⁰ of the largest are raised to
        that and set a status bit. None: all ranks are equal.
      repair: what the interior point does with int32 loads after rounding its plan to tokens. True:
        integer waves continue to the optimum in whole tokens, also with weights. False: the
        rounded plan is returned, with a status bit if rounding costs more than 1e-4.
      factor: how the interior point factors its matrix: "elimination", without subtraction, or
        "cusolverdx", NVIDIA's Cholesky, on GPUs of compute capability 9.0 if the library was built
        with it. The latter is slower and does not always converge (see docs/solvers.md), which
        status reports.
      tile: rows of a tile of the grouped GEMMs, static, 1 to 2²⁰. A slot then costs ⌈quota / tile⌉
        tiles, and the busiest rank gets the fewest tiles possible and, with the tiles of every slot
        fixed, the fewest tokens. None: balance tokens. Only for the exact solver.
      base_load: int32 `[ep_size]`, the same array on all ranks: work that each rank has in any case
        (shared experts, part of attention), in tokens or, with `tile`, in tiles. The solver
        balances on top of it; negative values count as 0 and set a status bit. None: nothing.

    Returns:
      A `Split`, or with `tile` a `TileSplit`. The exact solver's result has the same bits on every
      backend.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Source: phased maximum flow with Newton steps on the cut ratio, and Mehrotra's predictor and
    corrector (see `lplb_jax.reference`); the problem is DeepSeek LPLB's.

    >>> split = solve(jnp.array([9, 1, 1, 1], jnp.int32), topologies.ring(2))
    >>> split.quota.tolist()  # rank 0: experts 0 and 1 and a copy of 2; rank 1: 2, 3 and one of 0
    [5, 1, 0, 1, 1, 4]
    >>> split.max_load.tolist(), split.lower_bound.tolist()
    ([6], [6])
    >>> split = solve(jnp.array([9, 1, 1, 1], jnp.int32), topologies.ring(2), tile=4)
    >>> split.quota.tolist(), split.max_load.tolist(), split.max_tokens.tolist()
    ([5, 1, 0, 1, 1, 4], [3], [6])
    """
    loads = check_loads(loads, floats=True)
    method = choose_solver(solver, loads, rank_weights)
    problem = check_problem(loads, r2o, placement, axis_name=None)
    weights = check_weights(rank_weights, len(problem.r2o))
    costs = check_costs(tile, base_load, problem.ep_size, method)
    cusolverdx = check_factor(factor, method, problem, costs)
    return solve_checked(loads, problem, method, weights, repair, cusolverdx, costs)


def solve_checked(
    loads: jax.Array,
    problem: Problem,
    method: str = "exact",
    weights: jax.Array | np.ndarray | None = None,
    repair: bool = True,
    cusolverdx: bool = False,
    costs: Costs = NO_COSTS,
) -> Split | TileSplit:
    """`solve` of checked arguments; rows may carry a last place for ids that name no expert."""
    placement = problem.placement
    rows = loads.reshape(-1, loads.shape[-1])
    operands = (rows, placement.phy2log, placement.log2phy, problem.r2o)
    base = costs.of_ranks(problem.ep_size)
    if method == "exact" and costs.asked:
        sizes: dict[str, Any] = {"ep_size": problem.ep_size, "tile": costs.tile or 1}
        target = "lplb_solve_costs"
        split = _native.call(target, reference.solve_costs, *operands, base, **sizes)
        if costs.tile is not None:
            return TileSplit(*split)
        split = split[:4]
    elif method == "exact":
        split = _native.call("lplb_solve", reference.solve, *operands, ep_size=problem.ep_size)
    elif costs.asked:
        split = _native.call(
            "lplb_ipm_costs",
            reference.ipm_costs,
            *operands,
            np.ones(len(problem.r2o), np.float32) if weights is None else weights,
            base,
            ep_size=problem.ep_size,
            weighted=int(weights is not None),
            repair=int(repair),
        )
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
