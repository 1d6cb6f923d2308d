"""Batched calls of the native code and of its specification, compiled once per shape.

They bypass the checks of the public functions, so r2o and placements can vary within a batch.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from lplb_jax import reference, solve
from lplb_jax._problem import NO_COSTS, Problem
from lplb_jax.assignment import assign_tokens
from lplb_jax.balancer import _rebalance_at_once as rebalance_at_once
from lplb_jax.loads import count
from lplb_jax.solver import solve_checked
from lplb_jax.topologies import Topology


def on_cpu(function):
    """Runs `function` on the CPU, even if the default device is a GPU."""

    def run(*operands, **options):
        with jax.default_device(jax.devices("cpu")[0]):
            return function(*jax.tree.map(np.asarray, operands), **options)

    return run


def solve_instances(loads, stacked, case, **options):
    """The public solve: one Split per instance, through one compilation."""
    solver = jax.jit(
        jax.vmap(lambda loads, placement: solve(loads, case.r2o, placement=placement, **options))
    )
    splits = jax.tree.map(np.asarray, solver(loads, stacked))
    return [jax.tree.map(lambda array, i=i: array[i], splits) for i in range(len(loads))]


@jax.jit
@jax.vmap
def native_solve(loads, r2o, placement):
    """loads `[batch, n_sources, n_logical]`; r2o and placement also have a leading axis."""
    return tuple(solve_checked(loads, Problem(r2o, placement)))


@on_cpu
@jax.jit
@jax.vmap
def spec_solve(loads, r2o, placement):
    operands = (loads, placement.phy2log, placement.log2phy, r2o)
    return reference.solve(*operands, ep_size=placement.ep_size)


def problem_of(placement):
    """The problem along the placement's topology, or of any placement."""
    no_columns = np.zeros((placement.ep_size, 0), np.int32)
    return Problem(no_columns if placement.topology is None else placement.topology, placement)


def _over_ranks(assign_of_rank):
    """Maps over all source ranks of all instances: indices and counts are `[batch, ep_size, …]`."""

    def assign(indices, counts, quota, placement, *, proportional, positions=True):
        one = functools.partial(assign_of_rank, proportional=proportional, positions=positions)
        ranks = jax.vmap(one, in_axes=(0, None, None, None), axis_name="ep")
        return jax.vmap(ranks)(indices, counts, quota, placement)

    return jax.jit(assign, static_argnames=("proportional", "positions"))


@_over_ranks
def native_assign(indices, counts, quota, placement, *, proportional, positions):
    problem = problem_of(placement)
    own = counts[jax.lax.axis_index("ep")] if proportional else None
    loads = counts[0] if proportional else counts
    return assign_tokens(indices, loads, quota, problem, "ep", own, positions)


@on_cpu
@_over_ranks
def spec_assign(indices, counts, quota, placement, *, proportional, positions):
    rank = jax.lax.axis_index("ep")
    counts = counts[rank][None] if proportional else counts
    options = {"proportional": int(proportional), "positions": int(positions)}
    operands = (indices, counts, quota, placement.phy2log, placement.log2phy, rank)
    sizes = {"ep_size": placement.ep_size, "node_size": problem_of(placement).node_size}
    return reference.assign(*operands, **sizes, **options)


@functools.partial(jax.jit, static_argnames="positions")
def native_rebalance(indices, r2o, placement, *, positions=True):
    """indices `[batch, tokens]`: all tokens of each batch."""

    def one(indices, r2o, placement):
        problem = Problem(r2o, placement)
        return rebalance_at_once(indices, problem, None, None, positions, None, NO_COSTS)[:2]

    return jax.vmap(one)(indices, r2o, placement)


@on_cpu
@functools.partial(jax.jit, static_argnames="positions")
def spec_rebalance(indices, r2o, placement, *, positions=True):
    def one(indices, r2o, placement):
        operands = (indices, placement.phy2log, placement.log2phy, r2o)
        sizes = {"ep_size": placement.ep_size, "node_size": problem_of(placement).node_size}
        return reference.rebalance(*operands, **sizes, positions=int(positions), fan_out=0)

    return jax.vmap(one)(indices, r2o, placement)


native_count = jax.jit(count, static_argnums=1)
_count_by_spec = on_cpu(jax.jit(reference.count, static_argnames="n_logical"))


def spec_count(indices, n_logical):
    return _count_by_spec(indices.reshape(-1), n_logical=n_logical)


def repeated(tree, times):
    """Repeats a tree for every instance of a batch, including topologies outside placements."""

    def stacked(x):
        return np.repeat(np.asarray(x)[None], times, axis=0)

    return jax.tree.map(stacked, tree, is_leaf=lambda x: isinstance(x, Topology))


def assert_same(left, right) -> None:
    """Equal bit for bit: values, shapes and dtypes of all arrays."""
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
