"""moe_layer(): the public parts, in an order that overlaps transfers with computation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lplb_jax import metrics
from lplb_jax._axes import varying_as, varying_over
from lplb_jax._problem import (
    Problem,
    Solver,
    anywhere,
    check_array,
    check_flags,
    check_indices,
    check_problem,
)
from lplb_jax.assignment import Assignment, assign
from lplb_jax.balancer import rebalance
from lplb_jax.batch_copies import CopiesFrom, check_copies
from lplb_jax.comm import Comm
from lplb_jax.loads import count_loads
from lplb_jax.moe import transports
from lplb_jax.moe.copies import check_reverse
from lplb_jax.moe.exchange import capacity_for, check_dispatch
from lplb_jax.moe.experts import (
    applied,
    check_experts,
    check_tree,
    gated_units,
    network_of,
)
from lplb_jax.moe.moves import check_homes, uneven
from lplb_jax.moe.products import Gemm
from lplb_jax.moe.traffic import Traffic, traffic_of
from lplb_jax.moe.transfers import Beside
from lplb_jax.moe.weights import (
    InSlots,
    Own,
    WithRoom,
    as_weights,
    check_keeping,
    fetch_for,
    slot_order,
    unwrapped,
    with_room_for,
)
from lplb_jax.placement import Placement
from lplb_jax.solver import Split
from lplb_jax.status import Status

Balance = Literal["lplb", "eplb", "none"]
BALANCES = get_args(Balance)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["out", "traffic", "experts"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LayerResult:
    """The result of `moe_layer`.

    It unpacks: `out, traffic = moe_layer(…)`, or, if the experts have room for copies,
    `out, traffic, experts = moe_layer(…)`. As out_specs of `jax.shard_map`:
    `LayerResult(P("ep"), P())`, or with room `LayerResult(P("ep"), P(), P("ep"))`.

    Attributes:
      out: `[tokens, hidden]`, the weighted sums of the experts' results. If
        `traffic.overflow` is not 0, some choices are missing.
      traffic: loads, status and copies of this call.
      experts: the given experts with the copies filled in; None without room.
    """

    out: jax.Array
    traffic: Traffic
    experts: Any = None

    def __iter__(self) -> Iterator[Any]:
        yield from (self.out, self.traffic)
        if self.experts is not None:
            yield self.experts


def moe_layer(
    tokens: jax.Array,
    indices: Any,
    gates: jax.Array,
    experts: Any,
    r2o: Any = None,
    *,
    placement: Placement,
    axis_name: Any,
    balance: Balance = "lplb",
    copies: CopiesFrom = "placement",
    fan_out: int | None = None,
    keep_copies: bool = True,
    capacity_factor: float = 1.25,
    ffn: Callable[[jax.Array, Any, jax.Array], jax.Array] | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    solver: Solver = "auto",
    transport: transports.TokenTransport = "auto",
    gemm: Gemm = "auto",
    comm: Comm | None = None,
    in_place: bool = False,
    n_nodes: int | None = None,
    tile: int | str | None = None,
    base_load: Any = None,
) -> LayerResult:
    """A mixture-of-experts layer over the ranks of `axis_name`. Call it inside `jax.shard_map`.

    Its output and gradients match a layer on one device: which copy serves a token changes only the
    order of sums, and so the last bits. The router is not part of it: take `indices` and `gates`
    from its top-k. Only reverse-mode derivatives exist; `jax.jvp` raises. On GPUs, compile with
    `moe.COMPILER_OPTIONS`, so that XLA overlaps transfers with computation.

    Args:
      tokens: floats `[tokens, hidden]` of this rank; equally many on all ranks.
      indices: integers `[tokens, top_k]`, logical expert ids, −1 for none; see `rebalance`.
      gates: floats `[tokens, top_k]`, weights of the choices.
      experts: `Experts` of `tokens`' dtype, or with `ffn` any pytree. The types
        `Own`, `InSlots` and `WithRoom` say which experts a rank holds. Without a type, `in_place`
        means `WithRoom`; otherwise the leading size distinguishes the other two, so that weights of
        more experts than `placement` has may be taken for those of its slots. `Own` is checked.
      r2o: static topology, see `lplb_jax.topologies`; None for the placement's, or for a
        placement without one, see `Placement.from_phy2log`.
      placement: where the experts are, see `place_experts`.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      balance: "lplb": `rebalance`. "eplb": every source splits an expert's tokens evenly over its
        copies. "none": copies are neither fetched nor used.
      copies: "placement": those that `placement` has. "batch": chosen for these tokens, see
        `place_copies`; `experts` are then the rank's own, `r2o` is None, and the contents of the
        placement's other slots are ignored. Slots without a copy move no data and cost no time.
      fan_out: for copies="batch", the most copies of its experts that a rank sends; None for no
        limit.
      keep_copies: whether copies fetched here, without a topology, are kept for the backward pass.
        If not, they are fetched again there, and a deep model needs memory for one layer's copies
        only. The results have the same bits, but with transport "peer" not always the gradients of
        experts with several copies, which are then added up in another order. Not with `in_place`.
      capacity_factor: room for rows on a rank as a multiple of the mean, at least 1; see
        `capacity_for`. The "mosaic" GEMMs take as long as all of it does.
      ffn: your own network, called as `ffn(rows, experts, group_sizes)`: `rows` are
        `[n_rows, hidden]`, slot by slot, `group_sizes`, int32 `[slots]`, counts them per slot, and
        zeros follow the last group; `experts` has the weights of the slots, `[slots, …]`, arbitrary
        for slots without rows. It returns floats `[n_rows, …]`, which are multiplied by the gates;
        rows past the last group are ignored. It may close over values shared by all experts. Build
        it from `grouped_dot` and `per_row`. Integers among `experts` get no gradient. None for
        `expert_ffn`, the network of `Experts`.
      activation: the experts' activation, see `expert_ffn`; not with `ffn`.
      solver: see `rebalance`.
      transport: "ragged", "padded", "peer" or "auto", see `dispatch`.
      gemm: "mosaic", "xla" or "auto", see `expert_ffn`; not with `ffn`.
      comm: from `init_comm`; exchanges the loads, and the tokens with transport "peer", also where
        its transport is "nvshmem_put". None: loads by `lax.all_gather`.
      in_place: `experts` are `WithRoom`, even without that type. The result varies over all axes
        that `tokens` vary over; if the experts do not, fetch them with `replicate_weights`.
      n_nodes: number of nodes; tokens stay on their node if possible, see `rebalance`, and copies
        without a topology go to each other node once. None: the placement's.
      tile: rows of a tile of `gemm`, see `rebalance`; "mosaic" computes 192 rows at a time. None
        balances tokens.
      base_load: int32 `[ep_size]`, work that each rank has in any case, see `rebalance`.

    Returns:
      A `LayerResult`: `.out`, `[tokens, hidden]`; `.traffic`; and for experts with room `.experts`.
      `out, traffic = moe_layer(…)` unpacks it.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Example: one expert per rank, each with a copy on the other; every expert doubles or triples.

    >>> spec, ring = jax.sharding.PartitionSpec, topologies.ring(2)
    >>> mesh = jax.sharding.Mesh(jax.devices()[:2], "ep")
    >>> placement = place_experts(None, ring, n_logical=2, ep_size=2, redundants_per_rank=1)
    >>> def layer(tokens, indices, gates, experts):
    ...     return moe.moe_layer(
    ...         tokens, indices, gates, experts, ring, placement=placement, axis_name="ep",
    ...         activation=jnp.ones_like,
    ...     )
    >>> layer = jax.shard_map(
    ...     layer, mesh=mesh, in_specs=spec("ep"), out_specs=moe.LayerResult(spec("ep"), spec())
    ... )
    >>> experts = moe.Experts(jnp.ones((2, 1, 2)), jnp.array([2.0, 3.0]).reshape(2, 1, 1))
    >>> tokens, indices = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[0], [0], [0], [1]])
    >>> out, traffic = layer(tokens, indices, jnp.ones((4, 1)), experts)
    >>> out.ravel().tolist()
    [2.0, 4.0, 6.0, 12.0]
    >>> traffic.slot_loads.tolist(), int(traffic.overflow)  # of three, one to the copy on rank 1
    ([2, 0, 1, 1], 0)
    """
    indices = check_indices(indices)
    check_flags(keep_copies=keep_copies, in_place=in_place)
    problem = _check_balance(balance, copies, fan_out, r2o, placement, axis_name, n_nodes)
    _check_shapes(tokens, indices, gates)
    _check_network(ffn, activation, gemm, unwrapped(experts), tokens)
    check_reverse("tokens", (tokens, gates, experts))
    of_batch, uses_copies = copies == "batch", balance != "none"
    weights = as_weights(
        experts,
        placement,
        axis_name,
        in_place=in_place,
        uses_copies=uses_copies,
        of_batch=of_batch,
    )
    fetches = uses_copies and not isinstance(weights, InSlots)
    check_keeping(keep_copies, weights, problem, fetches=fetches)

    # The slot of every choice.
    n_tokens = len(tokens)
    tokens, indices, gates = _at_least_one(tokens, indices, gates)
    options = {"comm": comm, "solver": solver, "copies": copies, "fan_out": fan_out}
    options |= {"n_nodes": n_nodes, "tile": tile, "base_load": base_load}
    assignment, split, placement = _balanced(balance, indices, r2o, problem, axis_name, options)
    given = problem.placement
    problem = dataclasses.replace(problem, placement=placement)

    # The row of every choice on its rank.
    capacity = capacity_for(indices.size, problem.ep_size, capacity_factor)
    check_dispatch(tokens, gates, assignment, axis_name, capacity)
    if not isinstance(weights, InSlots) and not problem.along_topology:
        gates, split = _lost_if_uneven(gates, split, given)
    carrier = transports.choose_for_tokens(
        transport,
        tokens,
        gates,
        axis_name=axis_name,
        n_ranks=problem.ep_size,
        capacity=capacity,
        comm=comm,
    )
    order = slot_order(problem, uses_copies=uses_copies, fetches=fetches)
    tokens, gates = varying_over(tokens, axis_name), varying_over(gates, axis_name)
    counted = carrier.counted(assignment, axis_name, capacity, order)

    # Tokens travel, and copies of experts beside them.
    held = varying_as(weights.experts, tokens) if uses_copies else weights.experts
    fetch = None
    if fetches:
        again = not keep_copies
        fetch = fetch_for(held, problem, order, counted, carrier, fan_out, again=again)
    beside, refetch = Beside(held, fetch, waits=uses_copies), None
    if fetch is not None and isinstance(weights, Own):
        beside, refetch = with_room_for(fetch, held, keep_copies)
    rows, row_gates, held, plan = carrier.dispatch(tokens, gates, assignment, counted, beside)

    # The experts, and the way back.
    rows_last = beside.fetch is not None and beside.fetch.by_engines
    network = network_of(ffn) if ffn else gated_units(activation, gemm, rows_last=rows_last)
    sums = applied(network, rows, held, plan.group_sizes, row_gates, plan.summed, refetch)
    traffic = traffic_of(plan, split, problem, fetches=fetches)
    out = plan.home(sums)[:n_tokens]
    if not isinstance(weights, WithRoom):
        return LayerResult(out, traffic)
    return LayerResult(out, traffic, WithRoom(held) if experts is weights else held)


def _check_balance(
    balance: str,
    copies: str,
    fan_out: int | None,
    r2o: Any,
    placement: Placement,
    axis_name: Any,
    n_nodes: int | None,
) -> Problem:
    """The problem to balance; raises if the arguments contradict each other."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement: expected a lplb_jax.Placement, got {type(placement).__name__}; make one "
            f"with place_experts"
        )
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {', '.join(BALANCES)}, got {balance!r}")
    of_batch = check_copies(copies, r2o, fan_out, placement) is not None
    if of_batch and balance != "lplb":
        raise ValueError(f"balance: expected 'lplb' with copies='batch', got {balance!r}")
    problem = check_problem(None, r2o, placement, axis_name, n_nodes)
    return anywhere(placement, n_nodes) if of_batch else problem


def _lost_if_uneven(
    gates: jax.Array, split: Split, placement: Placement
) -> tuple[jax.Array, Split]:
    """NaN for gates, and a status, if own experts in home order do not fit their ranks.

    Raises if the placement is known.
    """
    homes = check_homes("placement", placement)
    if not isinstance(homes, jax.Array):
        return gates, split
    is_lost = uneven(homes, placement.n_physical, placement.ep_size)
    status = split.status | jnp.where(is_lost, Status.BAD_PLACEMENT, 0)
    return jnp.where(varying_as(is_lost, gates), jnp.nan, gates), split._replace(status=status)


def _check_shapes(tokens: jax.Array, indices: jax.Array, gates: jax.Array) -> None:
    """Raises if the shapes do not match; `check_dispatch` checks the rest."""
    check_array("tokens", tokens, "floats [tokens, hidden]")
    check_array("gates", gates, "floats [tokens, top_k]")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise ValueError(
            f"tokens: expected floats [tokens, hidden], got {tokens.dtype} {list(tokens.shape)}"
        )
    if indices.ndim != 2 or gates.shape != indices.shape or indices.shape[1] < 1:
        raise ValueError(
            f"gates: expected the shape of indices, [tokens, top_k], with top_k of at least 1, got "
            f"{list(gates.shape)} for indices {list(indices.shape)}"
        )


def _check_network(ffn: Any, activation: Any, gemm: str, experts: Any, tokens: jax.Array) -> None:
    """Raises if the experts do not match the network."""
    for name, function in (("ffn", ffn), ("activation", activation)):
        if not callable(function) and (function is not None or name == "activation"):
            raise TypeError(f"{name}: expected a function, got {function!r}")
    if ffn is None:
        check_experts(experts, tokens.shape[-1], tokens.dtype)
        return
    for name, value, default in (("activation", activation, jax.nn.silu), ("gemm", gemm, "auto")):
        if value is not default:
            raise ValueError(
                f"{name}: expected none where ffn is given, got {value!r}; choose it in ffn"
            )
    check_tree(experts)


def _at_least_one(
    tokens: jax.Array, indices: jax.Array, gates: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments, or without tokens, one token that chooses no expert: the same program."""
    if len(tokens) or indices.size:
        return tokens, indices, gates
    tokens, gates = (jnp.pad(array, [(0, 1), (0, 0)]) for array in (tokens, gates))
    return tokens, varying_as(jnp.full(gates.shape, -1, jnp.int32), indices), gates


def _balanced(
    balance: str,
    indices: jax.Array,
    r2o: Any,
    problem: Problem,
    axis_name: Any,
    options: dict[str, Any],
) -> tuple[Assignment, Split, Placement]:
    """The slot of every choice, and the placement with the copies that `rebalance` chose."""
    placement = problem.placement
    if balance == "lplb":
        assignment, split, *chosen = rebalance(
            indices, None, r2o, placement=placement, axis_name=axis_name, positions=True, **options
        )
        return assignment, split, chosen[0] if chosen else placement
    # Every source splits by its own counts, without knowing the other ranks' counts.
    quotas = metrics.even_quota if balance == "eplb" else metrics.home_quota
    own = count_loads(indices, placement.n_logical)
    unknown = jnp.zeros(problem.ep_size // len(problem.r2o), jnp.int32)
    split = Split(quotas(own, placement), unknown, unknown, unknown)
    assignment = assign(indices, own, split, r2o, placement=placement, positions=True)
    return assignment, split, placement
