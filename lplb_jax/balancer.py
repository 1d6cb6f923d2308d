"""rebalance(): the four steps, composed."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native, reference
from lplb_jax._problem import (
    AUTO_TILE,
    Costs,
    Problem,
    Solver,
    anywhere,
    check_costs,
    check_flags,
    check_indices,
    check_loads,
    check_problem,
    check_sources,
    check_weights,
    choose_solver,
)
from lplb_jax.assignment import (
    Assignment,
    as_assignment,
    assign_tokens,
    returned,
    workspace_shape,
)
from lplb_jax.batch_copies import (
    CopiesFrom,
    check_copies,
    copies_for,
    solve_copies_for,
    with_copies,
)
from lplb_jax.comm import Comm, check_comm
from lplb_jax.loads import all_gather_counts, count
from lplb_jax.placement import Placement
from lplb_jax.solver import Split, TileSplit, solve_checked
from lplb_jax.status import Status

_MANY = 1 << 30  # indices, for which no cluster of blocks suffices


@overload
def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: Literal[False] = False,
    copies: Literal["placement"] = "placement",
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> tuple[jax.Array, Split]: ...


@overload
def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: Literal[True],
    copies: Literal["placement"] = "placement",
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> tuple[Assignment, Split]: ...


@overload
def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: Literal[False] = False,
    copies: Literal["batch"],
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> tuple[jax.Array, Split, Placement]: ...


@overload
def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: Literal[True],
    copies: Literal["batch"],
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> tuple[Assignment, Split, Placement]: ...


@overload
def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: bool = False,
    copies: CopiesFrom = "placement",
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> tuple[Any, ...]: ...


def rebalance(
    indices: Any,
    loads: Any,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    axis_name: Any = None,
    comm: Comm | None = None,
    solver: Solver = "auto",
    rank_weights: Any = None,
    positions: bool = False,
    copies: CopiesFrom = "placement",
    fan_out: int | None = None,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> Any:
    """Routes tokens to replicas so that the busiest rank of each group gets the fewest possible.

    Args:
      indices: int32, int64, uint8 or uint16 of any shape: the logical expert ids that this rank's
        router chose. −1, or the largest value of an unsigned type where it is no id, means no
        expert. Other ids outside 0 … n_logical − 1 behave the same and set a status bit.
      loads: where the tokens per expert come from.
        None: counted from `indices`, and gathered over `axis_name` if that is given.
        int32 `[ep_size, n_logical]`: the counts of every source rank. Without `axis_name`,
        `indices` then has a leading axis of ep_size, one row per source rank.
        int32 `[n_logical]`: estimates; each source keeps its proportional share.
      r2o: static topology `[group_size, n_columns]`, see `lplb_jax.topologies`; None for the
        placement's. ep_size is a multiple of group_size; each group of consecutive ranks is solved
        on its own. If the placement carries none either, all ranks are one group, and an expert's
        tokens may go to any of its slots.
      placement: where the experts are, see `place_experts` and `Placement.from_phy2log`; None
        for the given order with one redundant slot per column (not if `loads` is None: it
        defines the number of experts).
      axis_name: the expert-parallel mesh axis (or a tuple of axes) inside `jax.shard_map`; None
        if there is no other rank: every shard then balances by itself, and `split` is right for its
        tokens alone. A warning says so if there are as many shards as ranks.
      comm: from `init_comm`: the counts are shared within the kernels that count and solve, in one
        launch or two. None: by `lax.all_gather`. See `sync_loads`.
      solver: "exact", "ipm" or "auto", see `solve`.
      rank_weights: float `[group_size]`, how fast every rank of a group is, see `solve`.
      positions: return an `Assignment` instead of the physical indices: it adds every token's
        position in its slot's list and the lists' lengths, so that permuting tokens into expert
        order is a scatter.
      copies: "placement": the redundant slots hold what `placement` says. "batch": they are filled
        for these tokens, see `place_copies`; only the homes and the number of slots of `placement`
        are used. Then `r2o` is None, and all ranks are one group. The exact solver starts from the
        tokens that moved when the copies were chosen, not from equal shares as in `solve`: the
        largest load is the same, but quotas may differ.
      fan_out: for copies="batch", the most copies of its experts that a rank may send; None for no
        limit.
      n_nodes: nodes with `ep_size / n_nodes` consecutive ranks each. A source's tokens then stay on
        their own rank, then on their own node, as far as the quotas allow, see `assign`. None: the
        placement's if it has no topology; along a topology, home ranks come first.
      tile: rows of a tile of the experts' grouped GEMMs, static, see `solve`; None balances
        tokens. "auto": 128 if slots have fewer than four such tiles on average, by the number of
        `indices` (of all ranks of `axis_name`), which is known at trace time; otherwise None. If
        tiles are balanced, the split is a `TileSplit`.
      base_load: int32 `[ep_size]`, work that each rank has in any case, see `solve`.

    Returns:
      `(physical_indices, split)`: int32 of `indices`' shape, slots 0 … n_physical − 1 or −1, and
      the `Split`. Unless loads are `[n_logical]`, the tokens at every slot, summed over the
      sources, are exactly `split.quota`. With `loads=None`, `split` is equal on all ranks; if
      loads are given, `split.status` also reports this rank's own indices.
      With copies="batch", `(physical_indices, split, placement)`: also the chosen
      `Placement`, whose slots these are. It is equal on all ranks if the loads are.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Example: two ranks; expert 0 is hot and has a copy on rank 1.

    >>> ring = topologies.ring(2)
    >>> placement = place_experts(None, ring, n_logical=4, ep_size=2, redundants_per_rank=1)
    >>> physical, split = rebalance(jnp.array([0, 0, 0, 2, 0, 1]), None, ring, placement=placement)
    >>> physical.tolist()  # rank 0 has slots 0 to 2, rank 1 slots 3 to 5
    [0, 0, 5, 3, 5, 1]
    >>> split.max_load.tolist()
    [3]

    Most tokens choose expert 2; now rank 0 gets a copy of it, and rank 1 none.

    >>> ids = jnp.array([2, 2, 2, 2, 0, 3])
    >>> _, split, chosen = rebalance(ids, None, placement=placement, copies="batch")
    >>> chosen.phy2log.tolist(), split.max_load.tolist()
    ([0, 1, 2, 2, 3, -1], [3])
    """
    given, indices = indices, check_indices(indices)
    check_flags(positions=positions)
    loads = None if loads is None else check_loads(loads)
    method = choose_solver(solver, loads, rank_weights)
    limit = check_copies(copies, r2o, fan_out, placement)
    problem = check_problem(loads, r2o, placement, axis_name, n_nodes)
    if limit is not None:
        problem = anywhere(problem.placement, n_nodes)
    weights = check_weights(rank_weights, len(problem.r2o))
    check_sources(indices, loads, problem, axis_name)
    if comm is not None:
        if loads is not None:
            raise ValueError("comm: expected None with given loads, which need no exchange")
        check_comm(comm, axis_name, problem.n_logical)

    n_tokens = indices.size * (1 if axis_name is None else problem.ep_size)
    most_tiles = n_tokens / problem.placement.n_physical / AUTO_TILE
    costs = check_costs(tile, base_load, problem.ep_size, method, most_tiles)

    at_once = comm.fuses if comm is not None else axis_name is None
    chooses = limit is not None
    # Along a topology, the fused kernels balance tokens, not tiles, and prefer home ranks.
    plain = not (problem.along_topology and (problem.node_size or costs.asked))
    plain = plain and not (chooses and costs.asked)
    at_once = at_once and plain and loads is None and method == "exact"
    # Who awaits the counts of an expert awaits the invalid ids of the rank of that number, too.
    at_once = at_once and (comm is None or problem.ep_size <= problem.n_logical)
    if at_once and _fits(problem, indices.size, chooses=chooses, synced=comm is not None):
        assigned, split, chosen = _rebalance_at_once(
            indices, problem, axis_name, comm, positions, limit, costs
        )
        physical = returned(given, assigned, positions)
        return (physical, split) if chosen is None else (physical, split, chosen)

    own = count(indices, problem.n_logical)
    sources = loads
    if sources is None:
        sources = own if axis_name is None else all_gather_counts(own, axis_name, comm)
    if limit is not None and method == "exact" and not costs.asked:
        split, chosen = solve_copies_for(sources, problem, limit)
        problem = anywhere(chosen, n_nodes)
    else:
        if limit is not None:
            problem = anywhere(copies_for(sources, problem.placement, limit), n_nodes)
        split = solve_checked(sources, problem, method, weights, costs=costs)
    if loads is None:
        loads = None if axis_name is None else sources
        if comm is not None and comm.transport != "xla":
            split = split._replace(status=_with_missing(split.status, sources))
    else:
        split = split._replace(status=_with_invalid(split.status, own))
    assigned = assign_tokens(indices, loads, split.quota, problem, axis_name, own, positions)
    physical = returned(given, assigned, positions)
    return (physical, split) if limit is None else (physical, split, problem.placement)


@jax.jit
def _with_invalid(status: jax.Array, own: jax.Array) -> jax.Array:
    return status | jnp.where(own[-1] > 0, jnp.int32(Status.INVALID_INDEX), 0)


@jax.jit
def _with_missing(status: jax.Array, sources: jax.Array) -> jax.Array:
    return jnp.where(sources[0, 0] < 0, jnp.int32(Status.SYNC_FAILED), status)


def _fits(problem: Problem, n_tokens: Any, *, chooses: bool, synced: bool) -> bool:
    """Whether all steps in one launch fit in the GPU's shared memory; separate launches need less.

    True without a GPU to query; native code then checks when the program runs.
    """
    extension = _native.cuda()
    if extension is None or jax.default_backend() != "gpu":
        return True
    placement = problem.placement
    most_slots = placement.log2phy.shape[-1]
    sizes = *problem.r2o.shape, placement.n_logical, placement.n_physical, most_slots
    quotas = "synced" if synced else "solved"
    if not isinstance(n_tokens, int):  # Symbolic, under jax.export.
        n_tokens = _MANY
    device = extension.current_device()
    try:
        extension.route_shape((placement.ep_size, *sizes), quotas, chooses, n_tokens, device)
    except ValueError:
        return False
    return True


def _rebalance_at_once(
    indices: jax.Array,
    problem: Problem,
    axis_name: Any,
    comm: Comm | None,
    positions: bool,
    fan_out: int | None,
    costs: Costs,
) -> tuple[Assignment, Split | TileSplit, Placement | None]:
    """All steps in one native call, which given `comm` also exchanges the ranks' counts.

    With `fan_out`, it first chooses the copies; the last result is their placement, None with
    `costs`.
    """
    placement = problem.placement
    operands: tuple[Any, ...] = (
        indices.reshape(-1),
        placement.phy2log,
        placement.log2phy,
        problem.r2o,
    )
    common: dict[str, Any] = {
        "workspace": workspace_shape(indices.size, problem.n_logical),
        "ep_size": problem.ep_size,
        "node_size": problem.node_size,
        "positions": int(positions),
    }
    if costs.asked:
        operands += (costs.of_ranks(problem.ep_size),)
        common["tile"] = costs.tile or 1
    else:
        common["fan_out"] = fan_out or 0
    if comm is not None:
        operands += (lax.axis_index(axis_name),)
        common |= {"axis_name": axis_name, "comm": comm.identifier}
    name = "rebalance" if comm is None else "synced_rebalance"
    name += "_costs" if costs.asked else ""
    results = _native.call(f"lplb_{name}", getattr(reference, name), *operands, **common)
    tokens, split, others = results[:3], Split(*results[3:7]), results[7:]
    assigned = as_assignment(indices, *tokens, positions=positions)
    if not costs.asked:
        return assigned, split, with_copies(placement, others) if others else None
    return assigned, split if costs.tile is None else TileSplit(*split, *others), None
