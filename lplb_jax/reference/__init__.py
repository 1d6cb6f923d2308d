"""The specification: every step in plain JAX, one function per step, written to be read.

It is the oracle of the tests, the fallback without native code and, through `jax.eval_shape`, the
source of the native calls' result types. The native code matches it bit for bit, except the
interior point, which is float32 and matches to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from lplb_jax.reference import assignment, balancer, batch_copies, exchange, loads, solver
from lplb_jax.reference import ipm as interior_point
from lplb_jax.reference import journeys as expert_journeys
from lplb_jax.reference import plan as exchange_plan

__all__ = [
    "assign",
    "back",
    "count",
    "ipm",
    "ipm_costs",
    "journeys",
    "place_copies",
    "plan",
    "rebalance",
    "rebalance_costs",
    "slots_by_row",
    "solve",
    "solve_copies",
    "solve_costs",
    "sync",
    "synced_plan",
    "synced_rebalance",
    "synced_rebalance_costs",
    "there",
    "weights_back",
    "weights_there",
]


def _with_default_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function` under JAX's default promotion rules, whatever rules the user has set.

    Under jax_numpy_dtype_promotion="strict" and jax_numpy_rank_promotion="raise", the specification
    would need casts and axes that say nothing about the method.
    """

    @functools.wraps(function)
    def run(*operands: Any, **options: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*operands, **options)

    return run


count = _with_default_promotion(loads.count)
sync = _with_default_promotion(loads.sync)
solve = _with_default_promotion(solver.solve)
solve_costs = _with_default_promotion(solver.solve_costs)
ipm = _with_default_promotion(interior_point.ipm)
ipm_costs = _with_default_promotion(interior_point.ipm_costs)
place_copies = _with_default_promotion(batch_copies.place_copies)
assign = _with_default_promotion(assignment.assign)
solve_copies = _with_default_promotion(balancer.solve_copies)
rebalance = _with_default_promotion(balancer.rebalance)
synced_rebalance = _with_default_promotion(balancer.synced_rebalance)
rebalance_costs = _with_default_promotion(balancer.rebalance_costs)
synced_rebalance_costs = _with_default_promotion(balancer.synced_rebalance_costs)
plan = _with_default_promotion(exchange_plan.plan)
synced_plan = _with_default_promotion(exchange_plan.synced_plan)
there = _with_default_promotion(exchange.there)
back = _with_default_promotion(exchange.back)
weights_there = _with_default_promotion(exchange.weights_there)
weights_back = _with_default_promotion(exchange.weights_back)
slots_by_row = _with_default_promotion(expert_journeys.slots_by_row)
journeys = _with_default_promotion(expert_journeys.journeys)
