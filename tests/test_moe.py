"""The expert-parallel layer against plain mathematics on one device, value and gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import moe_checks
import numpy as np
import pytest
import ragged_checks
from cases import Case, random_topology
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import n_compiled
from moe_checks import (
    HIDDEN,
    NAMES,
    PLAIN,
    ROOM,
    ROUTINGS,
    TOP_K,
    AnyCase,
    assert_equals_plain_mathematics,
    case_of,
    half_silent,
    in_slots,
    layer_over,
    nothing,
    one_expert,
    plainly,
    problem,
    ragged_by_gather,
    skewed,
    with_slopes,
)

from lplb_jax import (
    Assignment,
    Placement,
    init_comm,
    metrics,
    moe,
    place_experts,
    rebalance,
    topologies,
)
from lplb_jax.moe import collectives
from lplb_jax.moe import copies as copies_module
from lplb_jax.moe import experts as experts_module
from lplb_jax.moe import products as products_module

CASES = {
    "cube": lambda rng: Case(topologies.cube(), 4, combined=2),
    "ring": lambda rng: Case(topologies.ring(8), 3, combined=3),
    "torus": lambda rng: Case(topologies.torus(2, 4), 2),
    "complete": lambda rng: Case(topologies.complete(8), 7),
    "two groups of four": lambda rng: Case(topologies.ring(4), 4, n_groups=2, combined=2),
    "four groups of two": lambda rng: Case(topologies.ring(2), 2, n_groups=4),
    "random with self-copies": lambda rng: Case(random_topology(rng, 8, 3), 4),
}


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices, "ep")


MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict types": lambda: jax.numpy_dtype_promotion("strict"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
}

PORTABLE: dict[str, Any] = {"transport": "padded", "gemm": "xla"}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(rng, mesh, name):
    """All routings through one compiled program, each with its own placement."""
    case = CASES[name](rng)
    run = with_slopes(layer_over(mesh, case, **PORTABLE, **ROOM))
    for routing in ROUTINGS:
        floats, ids, placement = problem(rng, case, routing)
        traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
        loads = np.bincount(ids[ids >= 0], minlength=case.n_logical)
        of_experts = np.zeros(case.n_logical, np.int64)
        np.add.at(of_experts, placement.phy2log, traffic.slot_loads)
        np.testing.assert_array_equal(of_experts, loads)
        assert traffic.overflow == 0
        assert not traffic.status.any()
        received = np.asarray(metrics.rank_loads(traffic.slot_loads, case.ep_size))
        busiest = received.reshape(case.n_groups, -1).max(axis=1)
        np.testing.assert_array_equal(busiest, traffic.lower_bound)
    assert n_compiled(run) == 1


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("balance", ["none", "eplb", "lplb"])
def test_every_balance_is_the_same_mathematics(rng, mesh, balance, check_vma):
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, skewed)
    options: dict[str, Any] = {"balance": balance, "check_vma": check_vma}
    run = with_slopes(layer_over(mesh, case, **options, **PORTABLE, **ROOM))
    traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
    loads = np.bincount(ids[ids >= 0], minlength=case.n_logical).astype(np.int32)
    if balance == "none":
        np.testing.assert_array_equal(traffic.slot_loads, metrics.home_quota(loads, placement))
    elif balance == "eplb":
        # Every source sends one more home if its number of tokens is odd.
        even = np.asarray(metrics.even_quota(loads, placement))
        assert np.abs(traffic.slot_loads - even).max() <= case.ep_size


@pytest.mark.parametrize("transport", ["padded", "ragged"])
@pytest.mark.parametrize("sizes", [(8, 4, 19), (8, 5, 8), (4, 9, 30)])
def test_weights_for_the_slots_of_any_placement(rng, cpu_devices, monkeypatch, sizes, transport):
    """Bit for bit, and gradients are summed at home; one program for all placements."""
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    case = AnyCase(*sizes)
    mesh = Mesh(cpu_devices[: case.ep_size], "ep")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"), check_vma=False
    )
    def fetch(weights, placement):
        return moe.replicate_weights(
            weights, axis_name="ep", placement=placement, transport=transport
        )

    @jax.jit
    def run(weights, placement, slopes):
        slots, pull = jax.vjp(lambda weights: fetch(weights, placement), weights)
        return slots, pull(slopes)[0]

    for _ in range(3):
        placement = case.placement(rng)
        filled = placement.phy2log >= 0
        of_experts, of_slots = (
            {
                "matrix": rng.integers(-9, 10, (n, 6, 2)).astype(np.float32),  # sums are exact
                "scalar": rng.integers(-9, 10, n).astype(np.float32),
            }
            for n in (case.n_logical, len(filled))
        )
        slots, slopes = run(in_slots(of_experts, placement), placement, of_slots)
        for name, array in of_experts.items():
            want = np.zeros_like(of_slots[name])
            want[filled] = array[placement.phy2log[filled]]
            np.testing.assert_array_equal(slots[name], want)
            summed = np.zeros_like(array)
            np.add.at(summed, placement.phy2log[filled], of_slots[name][filled])
            np.testing.assert_array_equal(slopes[name], in_slots(summed, placement))
    assert n_compiled(run) == 1


@pytest.mark.parametrize("mode", MODES)
def test_weights_for_any_slots_in_strict_modes(rng, cpu_devices, monkeypatch, mode):
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    mesh, placement = Mesh(cpu_devices[:4], "ep"), AnyCase(4, 9, 30).placement(rng)
    weights = in_slots(rng.normal(0, 1, (30, 6, 2)).astype(jnp.bfloat16), placement)

    def pulled(transport):
        def fetch(weights):
            return moe.replicate_weights(
                weights, axis_name="ep", placement=placement, transport=transport
            )

        over = jax.shard_map(fetch, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
        slots, pull = jax.vjp(jax.jit(over), weights)
        return slots, pull(slots)[0]

    want = pulled("padded")
    with MODES[mode]():
        for transport in ("padded", "ragged"):
            for ours, theirs in zip(pulled(transport), want, strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_ragged_exchange_of_weights_has_the_same_types(rng, cpu_devices, check_vma):
    """CPUs can only trace it: with weights that vary over fewer axes than gradients."""
    mesh = Mesh(cpu_devices.reshape(2, 4), ("data", "ep"))
    placement = AnyCase(4, 9, 30).placement(rng)

    def types(transport):
        def slopes(weights, scale):
            def loss(weights):
                slots = moe.replicate_weights(
                    weights, axis_name="ep", placement=placement, transport=transport
                )
                return (slots * scale[0]).sum()

            return jax.grad(loss)(weights)

        over = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
        run = over(slopes, in_specs=(P("ep"), P(("data", "ep"))), out_specs=P("ep"))
        return jax.eval_shape(run, jnp.zeros((32, 6, 2)), jnp.ones(8))

    assert types("ragged") == types("padded")


def crowded(rng, case):
    """One expert on every rank with a spare slot, twice on ranks with two; one slot is empty."""
    placement = case.placement(rng)
    spare = np.setdiff1d(np.arange(placement.n_physical), placement.log2phy[:, 0])
    table = placement.phy2log.copy()
    table[spare] = rng.integers(case.n_logical)
    table[rng.choice(spare)] = -1
    return Placement.from_phy2log(table, ep_size=case.ep_size, n_logical=case.n_logical)


@pytest.mark.parametrize(
    ("sizes", "balance"),
    [((8, 4, 19), "lplb"), ((8, 4, 19), "eplb"), ((8, 4, 19), "none"), ((8, 3, 3), "lplb")],
)
def test_any_placement_equals_one_device(rng, mesh, sizes, balance):
    """Value and gradients, by one program for all placements; then moved to another placement."""
    case = AnyCase(*sizes)
    run = with_slopes(layer_over(mesh, case, balance=balance, **PORTABLE, **ROOM))
    for k, routing in enumerate([*ROUTINGS, skewed, one_expert]):
        floats, ids, placement = problem(rng, case, routing)
        if k >= len(ROUTINGS):
            placement = crowded(rng, case)
        traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
        of_experts = np.zeros(case.n_logical, np.int64)
        filled = placement.phy2log >= 0
        np.add.at(of_experts, placement.phy2log[filled], traffic.slot_loads[filled])
        loads = np.bincount(ids[ids >= 0], minlength=case.n_logical)
        np.testing.assert_array_equal(of_experts, loads)
        assert not traffic.slot_loads[~filled].any()
        assert not traffic.status.any()
        if balance == "lplb":
            assert metrics.rank_loads(traffic.slot_loads, 8).max() == traffic.lower_bound[0]
        moved = moe.move_experts(
            in_slots(floats[2], placement), placement, new := case.placement(rng)
        )
        jax.tree.map(np.testing.assert_array_equal, moved, in_slots(floats[2], new))
    assert n_compiled(run) == 1


def test_any_placements_by_layer_in_a_scan(rng, mesh):
    """Each layer has its own experts and placement: value and gradients, layer by layer."""
    case, n_layers = AnyCase(8, 4, 19), 3
    layers = [problem(rng, case, routing) for routing in (skewed, one_expert, half_silent)]
    (tokens, gates, experts), ids, placements = jax.tree.map(lambda *a: np.stack(a), *layers)
    tokens = tokens[0]

    def scanned(tokens, gates, experts, ids, placements):
        @jax.checkpoint
        def body(stream, layer):
            gates, experts, ids, placement = layer
            out, traffic = moe.moe_layer(
                stream, ids, gates, experts, placement=placement, axis_name="ep",
                **PORTABLE, **ROOM,
            )  # fmt: skip
            return stream + out, (traffic.status, traffic.overflow)

        return jax.lax.scan(body, tokens, (gates, experts, ids, placements))

    def plain(tokens, gates, experts, ids):
        for gates_, experts_, ids_ in zip(gates, zip(*experts, strict=True), ids, strict=True):
            tokens = tokens + plainly(tokens, gates_, moe.Experts(*experts_), ids_)
        return tokens, None

    by_layer = P(None, "ep")
    run = jax.shard_map(
        scanned,
        mesh=mesh,
        in_specs=(P("ep"), by_layer, by_layer, by_layer, P()),
        out_specs=(P("ep"), P()),
    )

    def in_slots_of_layers(experts):
        return jax.tree.map(lambda array: in_layers_slots(array, placements), experts)

    floats = tokens, gates, in_slots_of_layers(experts)
    upstream = rng.normal(0, 1, tokens.shape).astype(np.float32)
    *ours, flags = with_slopes(run)(floats, upstream, ids, placements)
    out, (*slopes, of_experts), _ = with_slopes(plain)((tokens, gates, experts), upstream, ids)
    expected = [out, *slopes, in_slots_of_layers(of_experts)]
    assert not any(flag.any() for flag in flags)
    assert len(of_experts.down) == n_layers
    for got, want in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        scale = max(np.abs(want).max(), 1e-6)
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_bad_any_placements(rng, mesh):
    case = AnyCase(8, 4, 19)
    placement = case.placement(rng)

    def refused(error, words, function, *arguments, **options):
        run = jax.shard_map(
            lambda _: function(*arguments, **options), mesh=mesh, in_specs=P("ep"), out_specs=P()
        )
        with pytest.raises(error, match=words) as raised:
            jax.eval_shape(run, jnp.zeros(8))
        assert "expected" in str(raised.value)
        assert "got" in str(raised.value)

    replicate = functools.partial(moe.replicate_weights, r2o=None, axis_name="ep")
    three = functools.partial(replicate, jnp.zeros((3, 2)), placement=placement)
    refused(ValueError, "^in_place: .*got True", three, in_place=True)
    refused(ValueError, "^redundants_per_rank: .*got 1", three, redundants_per_rank=1)
    refused(ValueError, "^transport: .*got 'carrier'", three, transport="carrier")
    words = r"^local_weights: .*\[3, …\].*got \[4, 2\]"
    refused(ValueError, words, replicate, jnp.zeros((4, 2)), placement=placement)
    other = AnyCase(4, 9, 30).placement(rng)
    refused(ValueError, "^axis_name: .*ep_size = 4.*size 8", replicate, 0, placement=other)
    crowded = np.full((8, 4), -1, np.int32)
    crowded.ravel()[:19] = np.arange(19)
    crowded = Placement.from_phy2log(crowded, ep_size=8)
    words = "^placement: .*at most 3 experts, got 4 on rank 0"
    refused(ValueError, words, replicate, 0, placement=crowded)


def with_and_without_comm(rng, mesh, case, **options):
    """Output, gradients and traffic with loads from a communicator, and from lax.all_gather."""
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)
    floats = tokens, gates, in_slots(experts, placement)
    with init_comm(mesh, max_experts=case.n_logical) as comm:
        return comm.transport, *(
            with_slopes(layer_over(mesh, case, comm=by, **ROOM, **options))(
                floats, np.ones_like(tokens), ids, placement
            )
            for by in (comm, None)
        )


def test_loads_by_a_communicator(rng, mesh):
    transport, ours, without = with_and_without_comm(rng, mesh, CASES["cube"](rng), **PORTABLE)
    assert transport == "xla"
    jax.tree.map(np.testing.assert_array_equal, ours, without)


def test_capacity_at_the_lower_bound_is_enough(rng, mesh):
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, skewed)
    experts = in_slots(floats[2], placement)
    roomy = jax.jit(layer_over(mesh, case, **PORTABLE, **ROOM))
    bound = int(roomy(*floats[:2], experts, ids, placement)[1].lower_bound[0])
    mean = len(ids) // 8 * TOP_K  # a multiple of 8
    exactly = {"capacity_factor": max(bound / mean, 1), **PORTABLE}
    run = with_slopes(layer_over(mesh, case, **exactly))
    traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
    assert traffic.capacity == -(-max(bound, mean) // 8) * 8
    assert traffic.overflow == 0


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_and_where_it_stands(rng, mesh, name):
    """Every token once to each rank that serves it; rows by slot, then source, then token."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ids = skewed(rng, case, 64)
    capacity = 64 * TOP_K

    def rank(tokens, ids, gates):
        assigned, _ = rebalance(
            ids, None, case.r2o, placement=placement, axis_name="ep", positions=True
        )
        rows, row_gates, plan = moe.dispatch(
            tokens, gates, assigned, axis_name="ep", capacity=capacity, transport="padded"
        )
        sizes = getattr(plan, "lists").sizes  # noqa: B009 plans of collectives have lists
        return assigned.physical_indices, rows, row_gates, plan.group_sizes, sizes

    run = jax.shard_map(
        rank, mesh=mesh, in_specs=P("ep"), out_specs=(*(P("ep"),) * 4, P()), check_vma=False
    )
    tokens = np.arange(64, dtype=np.float32)[:, None]
    gates = rng.random(ids.shape).astype(np.float32)
    slots, rows, row_gates, group_sizes, sizes = jax.jit(run)(tokens, ids, gates)
    slots, rows = np.asarray(slots), np.asarray(rows).reshape(8, capacity)
    n_slots = placement.n_physical // 8
    served = np.where(slots >= 0, slots // n_slots, -1)
    for destination in range(8):
        goes = (served == destination).any(axis=1).reshape(8, -1)
        np.testing.assert_array_equal(sizes[:, destination], goes.sum(axis=1))
        mine = np.argwhere(served == destination)  # by source, then token
        mine = mine[np.argsort(slots[tuple(mine.T)], kind="stable")]
        np.testing.assert_array_equal(rows[destination, : len(mine)], mine[:, 0])
        received = np.asarray(row_gates).reshape(8, -1)[destination, : len(mine)]
        np.testing.assert_array_equal(received, gates[tuple(mine.T)])
        assert np.asarray(group_sizes).reshape(8, -1)[destination].sum() == len(mine)


@pytest.mark.parametrize("room", [1.0, 8.0])
def test_derivatives_of_the_parts_are_the_true_ones(rng, mesh, room):
    """Gradients of every row, served or not, with arbitrary cotangents for undefined rows."""
    case = CASES["ring"](rng)
    placement, n_tokens = case.placement(rng), 64
    capacity = moe.capacity_for(n_tokens // 8 * TOP_K, 8, room)
    over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))

    @jax.jit
    @over
    def assigned(ids):
        return rebalance(ids, None, case.r2o, placement=placement, axis_name="ep", positions=True)[
            0
        ]

    @over
    def parts(tokens, gates, returned, assignment):
        rows, row_gates, plan = moe.dispatch(
            tokens, gates, assignment, axis_name="ep", capacity=capacity, transport="padded"
        )
        return rows, row_gates, moe.combine(returned, plan)

    def plain(tokens, gates, returned, sources):
        token, choice = sources
        served = token >= 0
        rows = jnp.where(served[:, None], tokens[token], 0)
        row_gates = jnp.where(served, gates.reshape(-1)[choice], 0)
        returned = jnp.where(served[:, None], returned, 0)
        return rows, row_gates, jnp.zeros_like(tokens).at[token].add(returned)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(function, floats, given, slopes):
        out, pull = jax.vjp(lambda *floats: function(*floats, given), *floats)
        return out, pull(slopes)

    def integers(*shape):  # of which sums are exact
        return rng.integers(-9, 10, shape).astype(np.float32)

    for routing in ROUTINGS:
        assignment = assigned(routing(rng, case, n_tokens).astype(np.int32))
        # Rows are ordered by slot, source and token; past a rank's capacity they are dropped.
        slots = np.asarray(assignment.physical_indices)
        token, choice = np.full((2, 8, capacity), -1)
        for rank in range(8):
            mine = np.argwhere((slots >= 0) & (slots // (placement.n_physical // 8) == rank))
            mine = mine[np.argsort(slots[tuple(mine.T)], kind="stable")][:capacity]
            token[rank, : len(mine)] = mine[:, 0]
            choice[rank, : len(mine)] = mine @ [TOP_K, 1]
        token, choice = token.ravel(), choice.ravel()
        served = token >= 0
        floats = integers(n_tokens, 4), integers(n_tokens, TOP_K), integers(len(token), 4)
        slopes = integers(len(token), 4), integers(len(token)), integers(n_tokens, 4)
        for slope in slopes[:2]:
            slope[~served] = np.nan
        got, slopes_got = pulled(parts, floats, assignment, slopes)
        want, slopes_want = pulled(plain, floats, (token, choice), slopes)
        for ours, theirs in zip(got[:2], want[:2], strict=True):
            np.testing.assert_array_equal(ours[served], theirs[served])
        np.testing.assert_array_equal(got[2], want[2])
        jax.tree.map(np.testing.assert_array_equal, slopes_got, slopes_want)


def test_derivatives_of_the_products_are_the_true_ones(rng):
    """Groups of all sizes; rows past the last group and their gradients hold arbitrary values."""
    n_rows, n_groups = 300, 6
    for _ in range(4):
        cuts = np.sort(rng.integers(0, n_rows + 1, n_groups + 1))
        sizes = np.diff(cuts).astype(np.int32)
        if rng.random() < 0.5:
            sizes[rng.integers(n_groups)] = 0
        group = np.repeat(np.arange(n_groups), sizes)
        used = np.arange(n_rows) < len(group)
        rows, gates, slope = (
            rng.normal(0, 1, shape).astype(np.float32)
            for shape in ((n_rows, 8), n_rows, (n_rows, 8))
        )
        for array in (rows, gates, slope):
            array[~used] = np.nan
        experts = moe.Experts(
            rng.normal(0, 1, (n_groups, 8, 12)).astype(np.float32),
            rng.normal(0, 1, (n_groups, 6, 8)).astype(np.float32),
        )

        def plain(rows, experts, gates, group=group):
            rows, gates = rows[: len(group)], gates[: len(group)]
            gate, up = jnp.split(jnp.einsum("mk,mkn->mn", rows, experts.gate_up[group]), 2, axis=1)
            hidden = jax.nn.silu(gate) * up * gates[:, None]
            return jnp.einsum("mk,mkn->mn", hidden, experts.down[group])

        def ours(rows, experts, gates, sizes=sizes):
            return moe.expert_ffn(rows, experts, jnp.asarray(sizes), gates=gates, gemm="xla")

        out, pull = jax.vjp(ours, rows, experts, gates)
        want, plain_pull = jax.vjp(plain, rows, experts, gates)
        np.testing.assert_allclose(out[: len(group)], want, atol=1e-3)
        got, expected = pull(jnp.asarray(slope)), plain_pull(jnp.asarray(slope[: len(group)]))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_forward_mode_is_refused_in_words(rng, mesh):
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, skewed)
    experts = in_slots(floats[2], placement)
    layer = layer_over(mesh, case, balance="none", **PORTABLE, **ROOM)

    def of_tokens(tokens):
        return layer(tokens, floats[1], experts, ids, placement)[0]

    for function, words in ((of_tokens, "^tokens: expected reverse"), (jax.jit(of_tokens), "jvp")):
        with pytest.raises(TypeError, match=words):
            jax.jvp(function, (floats[0],), (floats[0],))


def test_a_diverged_expert_reaches_its_own_tokens_only(rng, mesh):
    """NaN or infinite weights of each expert in turn: all else keeps its bits, also gradients."""
    case = CASES["two groups of four"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)
    run = with_slopes(layer_over(mesh, case, **PORTABLE, **ROOM))

    def results(experts):
        out, slopes, _ = run(
            (tokens, gates, in_slots(experts, placement)), np.ones_like(tokens), ids, placement
        )
        return jax.tree.map(np.asarray, (out, *slopes))

    own = np.asarray(in_slots(np.arange(case.n_logical), placement))
    out, of_tokens, of_gates, of_experts = results(experts)
    for expert in range(case.n_logical):
        bad = jax.tree.map(np.copy, experts)
        for weights, value in zip(bad, rng.permutation([np.nan, np.inf]), strict=True):
            weights[expert] = value
        got = results(bad)
        clean = (ids != expert).all(axis=1)
        assert np.isfinite(got[0][clean]).all()
        np.testing.assert_array_equal(got[0][clean], out[clean])
        np.testing.assert_array_equal(got[1][clean], of_tokens[clean])
        np.testing.assert_array_equal(got[2][ids != expert], of_gates[ids != expert])
        for ours, want in zip(got[3], of_experts, strict=True):
            np.testing.assert_array_equal(ours[own != expert], want[own != expert])


def test_without_balance_others_do_not_change_a_bit(rng, mesh):
    """Tokens with unchanged routing, when half of all tokens are rerouted."""
    case = CASES["cube"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed, 256)
    run = with_slopes(layer_over(mesh, case, balance="none", **PORTABLE, **ROOM))
    anew = rng.random(256) < 0.5
    others = np.where(anew[:, None], one_expert(rng, case, 256), ids).astype(np.int32)
    floats = tokens, gates, in_slots(experts, placement)
    results = []
    for routed in (ids, others):
        out, slopes, _ = run(floats, tokens, routed, placement)
        results.append([np.asarray(array)[~anew] for array in (out, *slopes[:2])])
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("balance", ["none", "eplb", "lplb"])
def test_an_empty_batch(rng, mesh, balance):
    if jaxlib.version.__version__.startswith("0.11.") and mesh.devices[0].platform == "cpu":
        pytest.skip(
            "XLA of jaxlib 0.11 crashes where an input of shard_map is empty: x, y -> x, y + 1"
        )
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, nothing)
    experts = in_slots(floats[2], placement)
    empty = floats[0][:0], floats[1][:0], experts
    run = with_slopes(layer_over(mesh, case, balance=balance, **PORTABLE))
    out, (of_tokens, of_gates, of_experts), traffic = run(empty, floats[0][:0], ids[:0], placement)
    assert (out.shape, of_tokens.shape, of_gates.shape) == ((0, HIDDEN), (0, HIDDEN), (0, TOP_K))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_experts))
    # Along a topology all copies travel, whether or not they serve tokens.
    traffic = traffic._replace(capacity=0, phy2log=0, copies=traffic.copies.rows_saved)
    assert not any(np.any(leaf) for leaf in traffic)


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_in_strict_modes(rng, mesh, mode):
    """For moe alone, with a given assignment: the same bits and dtypes as otherwise."""
    case = CASES["cube"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed, dtype=jnp.bfloat16)
    gates = gates.astype(np.float32)
    over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    n_copies = placement.redundants_per_rank
    assignment = jax.jit(
        over(
            lambda ids: rebalance(
                ids, None, case.r2o, placement=placement, axis_name="ep", positions=True
            )[0]
        )
    )(ids)
    newer = case.placement(rng)

    def layer(tokens, gates, experts, assignment):
        experts = moe.replicate_weights(experts, case.r2o, "ep", redundants_per_rank=n_copies)
        rows, row_gates, plan = moe.dispatch(
            tokens, gates, assignment, axis_name="ep", capacity=200, transport="padded"
        )
        rows = moe.expert_ffn(rows, experts, plan.group_sizes, gates=row_gates, gemm="xla")
        facts = plan.slot_loads, plan.overflow[None], plan.group_sizes
        return moe.combine(rows, plan), facts

    def everything():
        run = with_slopes(over(layer))
        own = in_slots(experts, placement)
        results = run((tokens, gates, own), np.float32(1), assignment)
        loads = np.bincount(ids[ids >= 0], minlength=case.n_logical).astype(np.int32)
        quotas = [of(loads, placement) for of in (metrics.home_quota, metrics.even_quota)]
        figures = [metrics.tokens_moved(quotas[1], placement)]
        for received in (metrics.rank_loads(quota, 8) for quota in quotas):
            figures += [received, metrics.imbalance(received), metrics.gain(received, received)]
        return results, moe.move_experts(own, placement, newer), quotas, figures

    want = everything()
    with MODES[mode]():
        got = everything()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("balance", ["none", "eplb", "lplb"])
def test_the_layer_with_wide_types(rng, mesh, balance):
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, skewed)
    with jax.enable_x64(True):
        run = with_slopes(layer_over(mesh, case, balance=balance, **PORTABLE, **ROOM))
        traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(traffic))


@pytest.mark.parametrize("routing", [skewed, one_expert])
def test_overflow_is_counted_and_left_out(rng, mesh, routing):
    """Rows that fit are served as usual; dropped rows return nothing."""
    case = CASES["ring"](rng)
    floats, ids, placement = problem(rng, case, routing)
    experts = in_slots(floats[2], placement)
    layer = layer_over(mesh, case, balance="none", capacity_factor=1.0, **PORTABLE)
    run = jax.jit(lambda *arguments: layer(*arguments, placement))
    capacity = 64 // 8 * TOP_K
    out, traffic = run(floats[0], floats[1], experts, ids)
    received = np.asarray(metrics.rank_loads(traffic.slot_loads, 8))
    assert received.max() > capacity, "the routing is too even for this test"
    assert traffic.overflow == np.maximum(received - capacity, 0).sum()

    # Dropped choices are those whose gate does not change the output.
    def served(gates):
        return run(floats[0], gates, experts, ids)[0].sum(axis=1)

    slope = jax.grad(lambda gates: served(gates).sum())(floats[1])
    kept = (np.asarray(slope) != 0) & (ids >= 0)
    assert (ids >= 0).sum() - kept.sum() == traffic.overflow
    with jax.default_device(mesh.devices[0]):
        expected = plainly(floats[0], np.where(kept, floats[1], 0), floats[2], ids)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_rows_that_nobody_sent_do_not_matter(rng, mesh, monkeypatch):
    """The ragged transport leaves memory there unchanged: possibly NaN, in both directions."""
    clean = collectives.exchange

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def spoiled(array, lists, way):
        out = clean(array, lists, way)
        got = lists if way == "there" else dataclasses.replace(lists, sizes=lists.sizes.T)
        there = lists.transport.arrived(got, jax.lax.axis_index("ep"))
        anything = jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else 7
        return jnp.where(there.reshape(-1, *[1] * (out.ndim - 1)), out, anything)

    other = {"there": "back", "back": "there"}
    spoiled.defvjp(
        lambda array, lists, way: (spoiled(array, lists, way), lists),
        lambda way, lists, slope: (spoiled(slope, lists, other[way]), None),
    )
    monkeypatch.setattr(collectives, "exchange", spoiled)
    case = CASES["ring"](rng)
    for room in ({"capacity_factor": 1.0}, ROOM):
        run = with_slopes(layer_over(mesh, case, **PORTABLE, **room))
        for routing in (skewed, half_silent, nothing):
            floats, ids, placement = problem(rng, case, routing)
            if room == ROOM:
                assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
            experts = in_slots(floats[2], placement)
            results = run((*floats[:2], experts), floats[0], ids, placement)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_scattered_copies_are_what_a_gather_gives(rng):
    """The kernel for GPUs, interpreted, including entries without any copy."""
    for columns in (256, 384):
        exists = rng.random((30, 3)) < 0.6
        exists[rng.integers(30)] = False
        n_copies = int(exists.sum())
        places = np.full(exists.shape, n_copies, np.int32)
        places[exists] = rng.permutation(n_copies)
        copies = copies_module.Copies(
            copies_module.choice_at(jnp.asarray(places), n_copies) // 3, jnp.asarray(places)
        )
        entries = jnp.asarray(rng.normal(0, 1, (30, columns)), jnp.bfloat16)
        ours = copies_module.scattered(entries, copies, interpret=True)
        np.testing.assert_array_equal(ours, copies_module.copy(entries, copies))


@pytest.mark.parametrize("rows_last", [False, True])
def test_blocks_of_kernels_that_reach_past_the_last_group(rng, rows_last):
    """Like the kernels: reads whole blocks, and multiplies rows of other groups by zero."""
    block = 64

    def of_rows(rows, weights, sizes, transposed=False):
        weights = weights.swapaxes(1, 2) if transposed else weights
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
        out = jnp.einsum("mk,mkn->mn", rows, weights[jnp.minimum(group, len(sizes) - 1)])
        return jnp.where((group < len(sizes))[:, None], out, jnp.nan)

    def of_weights(rows, slope, sizes):
        ends, row = jnp.cumsum(sizes), jnp.arange(len(rows))
        starts = ends - sizes
        read = (row >= starts[:, None] // block * block) & (
            row < -(-ends[:, None] // block) * block
        )
        mine = (row >= starts[:, None]) & (row < ends[:, None])
        of_group = jnp.where(read[..., None], rows * mine[..., None], 0)
        of_slope = jnp.where(read[..., None], slope, 0)
        return jnp.where(
            (sizes > 0)[:, None, None], jnp.einsum("gmk,gmn->gkn", of_group, of_slope), 0
        )

    kernels = products_module.MOSAIC._replace(of_rows=of_rows, of_weights=of_weights)
    rows = rng.normal(0, 1, (200, 8)).astype(np.float32)
    gates = rng.random(200).astype(np.float32)
    experts = moe.Experts(
        rng.normal(0, 1, (4, 8, 12)).astype(np.float32),
        rng.normal(0, 1, (4, 6, 8)).astype(np.float32),
    )
    for sizes in ([50, 0, 30, 7], [0, 0, 0, 0], [100, 50, 40, 10], [1, 0, 0, 127], [0, 190, 3, 0]):
        sizes = jnp.array(sizes, jnp.int32)
        inside = np.arange(200) < sizes.sum()
        upstream = rng.normal(0, 1, (200, 8)).astype(np.float32)

        def pulled(products, rows, gates, upstream, sizes=sizes):
            ffn = functools.partial(experts_module._ffn, jax.nn.silu, products, rows_last)
            out, pull = jax.vjp(lambda *floats: ffn(*floats, sizes), rows, experts, gates)
            of_rows, of_experts, of_gates = pull(upstream)
            return out, of_rows, of_gates, *of_experts

        spoiled = (
            jnp.where(inside.reshape(-1, *[1] * (array.ndim - 1)), array, jnp.nan)
            for array in (rows, gates, upstream)
        )
        got = pulled(kernels, *spoiled)
        want = pulled(products_module.XLA, *map(jnp.asarray, (rows, gates, upstream)))
        names = ["output", "rows", "gates", "gate_up", "down"]
        for name, ours, theirs in zip(names, got, want, strict=True):
            if len(ours) == 200:
                ours, theirs = ours[inside], theirs[inside]
            np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("balance", ["eplb", "lplb"])
def test_who_fetches_the_copies_and_where_to(rng, mesh, balance):
    """By the layer or its caller, into new arrays or into room after own weights: no difference."""
    case = CASES["cube"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)
    n_copies = placement.redundants_per_rank

    def by_rank(array):
        return array.reshape(8, -1, *array.shape[1:])

    def roomy(array):
        array = by_rank(array)
        room = np.full((8, n_copies, *array.shape[2:]), np.nan, array.dtype)
        return np.concatenate([array, room], axis=1).reshape(-1, *array.shape[2:])

    def rank(tokens, gates, experts, ids, *, early, in_place):
        if early:
            experts = moe.replicate_weights(
                experts, case.r2o, "ep", redundants_per_rank=n_copies, in_place=in_place
            )
        result = moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
            balance=balance, in_place=in_place and not early, **PORTABLE, **ROOM,
        )  # fmt: skip
        return result.out, result.experts

    def run(experts, **options):
        function = jax.shard_map(
            functools.partial(rank, **options), mesh=mesh, in_specs=P("ep"), out_specs=P("ep")
        )
        run = jax.jit(with_slopes(function), compiler_options=moe.COMPILER_OPTIONS)
        return run((tokens, gates, experts), tokens, ids)

    own = in_slots(experts, placement)
    want = run(own, early=False, in_place=False)[:2]
    got = run(own, early=True, in_place=False)[:2]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for early in (False, True):
        out, (*slopes, of_experts), filled = run(
            jax.tree.map(roomy, own), early=early, in_place=True
        )
        of_own, of_room = (
            jax.tree.map(
                lambda array, part=part: by_rank(array)[:, part].reshape(-1, *array.shape[1:]),
                of_experts,
            )
            for part in (slice(case.n_local), slice(case.n_local, None))
        )
        assert not any(array.any() for array in jax.tree.leaves(of_room))
        jax.tree.map(np.testing.assert_array_equal, (out, (*slopes, of_own)), want)
        copies = jax.tree.map(lambda array: array[placement.phy2log], experts)
        jax.tree.map(np.testing.assert_array_equal, filled, None if early else copies)


@pytest.mark.parametrize("how", [ragged_checks.HOW[0], ragged_checks.HOW[-1]])
def test_both_collectives_give_the_same_bits(rng, cpu_devices, monkeypatch, how):
    """96 and 256 experts, including gradients. For GPUs of several processes: test_gpu_sync.py."""
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    sizes = ragged_checks.Sizes(hidden=16, width=8, tokens=32, layers=1, calls=1, dtype=np.float32)
    ragged_checks.check(Mesh(cpu_devices[:2], "ep"), rng, sizes, how=[how])


@pytest.mark.parametrize("kind", [moe.Own, moe.InSlots, moe.WithRoom])
def test_weights_that_say_what_they_are(rng, cpu_devices, kind):
    """The same program as for bare weights; results and gradients have their type."""
    mesh, case = Mesh(cpu_devices[:2], "ep"), moe_checks.case_of(2)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed, 16)
    n = placement.n_logical if kind is moe.Own else placement.n_physical
    experts = jax.tree.map(lambda array: np.resize(array, (n, *array.shape[1:])), experts)
    in_place = kind is moe.WithRoom

    def program(experts, **options):
        def rank(tokens, gates, experts):
            result = moe.moe_layer(
                tokens, ids[: len(tokens)], gates, experts, placement=placement, axis_name="ep",
                **PORTABLE, **options,
            )  # fmt: skip
            return result.out, (result.traffic, result.experts)

        specs = {"in_specs": P("ep"), "out_specs": (P("ep"), (P(), P("ep")))}
        run = jax.shard_map(rank, mesh=mesh, **specs)
        text = jax.make_jaxpr(with_slopes(run))((tokens, gates, experts), tokens)
        return text, jax.eval_shape(with_slopes(run), (tokens, gates, experts), tokens)

    bare, typed = program(experts, in_place=in_place), program(kind(experts))
    assert str(bare[0]) == str(typed[0])
    _, slopes, (_, filled) = typed[1]
    assert type(slopes[2]) is kind
    assert type(filled) is (kind if in_place else type(None))
    assert bare[1][1][2] == slopes[2].experts


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (moe.InSlots, {}, "^experts: expected the 8 slots, got 5"),
        (moe.InSlots, {"balance": "none"}, "^experts: expected Own or WithRoom .* got InSlots"),
        (moe.WithRoom, {}, "^experts: expected the 5 own .* and room for 3 copies, got 5"),
        (moe.Own, {"in_place": True}, "^in_place: expected it with .*WithRoom, got Own"),
    ],
)
def test_weights_that_are_not_what_they_say(rng, cpu_devices, kind, options, words):
    mesh, case = Mesh(cpu_devices[:2], "ep"), moe_checks.case_of(2)
    floats, ids, placement = problem(rng, case, skewed, 16)
    n_own = placement.n_logical // 2

    def rank(tokens, gates, experts, ids):
        options_of_all = {"placement": placement, "axis_name": "ep", **PORTABLE, **options}
        return moe.moe_layer(tokens, ids, gates, kind(experts), **options_of_all).out

    assert n_own == 5
    run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, *floats, ids)


def test_a_result_unpacks():
    """Into two, or three with room for copies, in the order of its attributes; a pytree."""
    out, traffic = moe.LayerResult(1, 2)
    assert (out, traffic) == (1, 2)
    out, traffic, experts = moe.LayerResult(1, 2, 3)
    assert (out, traffic, experts) == (1, 2, 3)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, moe.LayerResult(1, 2, 3))
    assert doubled == moe.LayerResult(2, 4, 6)


def test_the_layer_does_what_its_parts_do(rng, mesh):
    """In a different order, but with the same bits: value and gradients."""
    case = CASES["cube"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)
    where: dict[str, Any] = {"placement": placement, "axis_name": "ep"}

    def parts(tokens, gates, experts, ids):
        experts = moe.replicate_weights(experts, case.r2o, **where)
        assignment, _ = rebalance(ids, None, case.r2o, positions=True, **where)
        capacity = moe.capacity_for(ids.size, 8, ROOM["capacity_factor"])
        rows, row_gates, plan = moe.dispatch(
            tokens, gates, assignment, axis_name="ep", capacity=capacity, transport="padded"
        )
        rows = moe.expert_ffn(rows, experts, plan.group_sizes, gates=row_gates, gemm="xla")
        return moe.combine(rows, plan), plan.slot_loads

    def layer(tokens, gates, experts, ids):
        out, traffic = moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, **where, **PORTABLE, **ROOM
        )
        return out, traffic.slot_loads

    results = []
    for function in (parts, layer):
        run = jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P()))
        floats = tokens, gates, in_slots(experts, placement)
        results.append(with_slopes(run)(floats, tokens, ids))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_none_in_place(rng, mesh):
    """Without balance there is no room, and the experts come back as they are."""
    case = CASES["cube"](rng)
    floats, ids, placement = problem(rng, case, skewed)
    own = in_slots(floats[2], placement)

    def rank(experts, tokens, gates, ids, **options):
        return moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
            balance="none", **PORTABLE, **ROOM, **options,
        )  # fmt: skip

    def run(out_specs, **options):
        function = functools.partial(rank, **options)
        function = jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=out_specs)
        return jax.jit(function)(own, *floats[:2], ids)

    out, traffic, experts = run(moe.LayerResult(P("ep"), P(), P("ep")), in_place=True)
    jax.tree.map(np.testing.assert_array_equal, experts, own)
    expected = run(moe.LayerResult(P("ep"), P()))
    jax.tree.map(np.testing.assert_array_equal, (out, traffic), tuple(expected))


def test_rematerialised_layers_in_a_scan(rng, mesh):
    """Like deep models: the same as unrolled with everything kept."""
    case = CASES["cube"](rng)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)
    experts = in_slots(experts, placement)
    n_layers = 3
    gates = gates * np.linspace(0.5, 1, n_layers, dtype=np.float32)[:, None, None]

    def layer(stream, gates, experts, ids):
        out, traffic = moe.moe_layer(
            stream, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
            **PORTABLE, **ROOM,
        )  # fmt: skip
        return stream + out, traffic.overflow

    def scanned(tokens, gates, experts, ids):
        @jax.checkpoint
        def body(stream, gates):
            return layer(stream, gates, experts, ids)

        return jax.lax.scan(body, tokens, gates)

    def unrolled(tokens, gates, experts, ids):
        overflows = []
        for of_layer in gates:
            tokens, overflow = layer(tokens, of_layer, experts, ids)
            overflows.append(overflow)
        return tokens, jnp.stack(overflows)

    results = []
    for model in (scanned, unrolled):
        run = jax.shard_map(
            model,
            mesh=mesh,
            in_specs=(P("ep"), P(None, "ep"), P("ep"), P("ep")),
            out_specs=(P("ep"), P()),
        )
        results.append(with_slopes(run)((tokens, gates, experts), tokens, ids))
    for ours, plain in zip(*map(jax.tree.leaves, results), strict=True):
        scale = max(np.abs(plain).max(), 1e-6)
        np.testing.assert_allclose(ours / scale, plain / scale, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_replicas_are_what_the_placement_says(rng, mesh, name):
    """Bit for bit the weights of every slot's expert, and gradients are summed at home."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    of_experts = rng.normal(0, 1, (case.n_logical, 5)).astype(np.float32)
    fetch = jax.shard_map(
        lambda weights: moe.replicate_weights(
            weights, case.r2o, "ep", redundants_per_rank=placement.redundants_per_rank
        ),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    slots, pull = jax.vjp(fetch, in_slots(of_experts, placement))
    np.testing.assert_array_equal(slots, of_experts[placement.phy2log])

    slopes = rng.integers(-9, 10, slots.shape).astype(np.float32)  # sums are exact
    expected = np.zeros_like(of_experts)
    np.add.at(expected, placement.phy2log, slopes)
    np.testing.assert_array_equal(pull(jnp.asarray(slopes))[0], in_slots(expected, placement))


def test_a_sub_axis_of_a_mesh(rng, cpu_devices):
    """data 2 × ep 4: two batches with the same experts."""
    mesh = Mesh(cpu_devices.reshape(2, 4), ("data", "ep"))
    case = Case(topologies.ring(4), 3, combined=2)
    (tokens, gates, experts), ids, placement = problem(rng, case, skewed)

    def rank(tokens, gates, experts, ids):
        return moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
            **PORTABLE, **ROOM,
        ).out, None  # fmt: skip

    both = P(("data", "ep"))
    run = jax.shard_map(
        rank, mesh=mesh, in_specs=(both, both, P("ep"), both), out_specs=(both, P())
    )
    out, (*slopes, of_experts), _ = with_slopes(run)(
        (tokens, gates, in_slots(experts, placement)), tokens, ids
    )
    with jax.default_device(jax.devices("cpu")[0]):
        plain, (*expected, expected_of_experts), _ = PLAIN((tokens, gates, experts), tokens, ids)
    expected = [plain, *expected, *in_slots(expected_of_experts, placement)]
    for name, got, want in zip(NAMES, [out, *slopes, *of_experts], expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "axes", "check_vma"),
    [
        ({"a": 2, "b": 4}, ("b", "a"), True),
        ({"a": 2, "b": 2, "c": 2}, ("c", "a", "b"), False),
    ],
)
def test_several_axes_in_any_order(rng, mesh, sizes, axes, check_vma):
    """Ranks are numbered in the given order of axes, not in the mesh's."""
    case = Case(random_topology(rng, 8, 2), 4)
    floats, ids, placement = problem(rng, case, skewed)
    floats = *floats[:2], in_slots(floats[2], placement)
    several = Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes))

    def results(mesh, axes):
        def layer(tokens, gates, experts, ids):
            out, traffic = moe.moe_layer(
                tokens, ids, gates, experts, case.r2o, placement=placement, axis_name=axes,
                **PORTABLE, **ROOM,
            )  # fmt: skip
            return out, traffic

        def replicas(weights):
            fetch = functools.partial(moe.replicate_weights, weights, case.r2o, axes)
            return fetch(redundants_per_rank=2), fetch(redundants_per_rank=2, in_place=True)

        over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(axes), check_vma=check_vma)
        run = with_slopes(over(layer, out_specs=(P(axes), P())))
        weights = floats[2].down
        slots, pull = jax.vjp(over(replicas, out_specs=P(axes)), weights)
        return run(floats, floats[0], ids), slots, pull(slots)

    got, want = results(several, axes), results(mesh, "ep")
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_ragged_transport_has_the_same_types(rng, cpu_devices, check_vma):
    """CPUs can only trace it: with experts that vary over fewer axes than tokens."""
    mesh = Mesh(cpu_devices.reshape(2, 4), ("data", "ep"))
    case = Case(topologies.ring(4), 3, combined=2)
    floats, ids, placement = problem(rng, case, skewed)
    floats = *floats[:2], in_slots(floats[2], placement)
    both = P(("data", "ep"))

    def types(transport):
        def rank(tokens, gates, experts, ids):
            return moe.moe_layer(
                tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
                transport=transport, gemm="xla",
            ).out, None  # fmt: skip

        run = jax.shard_map(
            rank,
            mesh=mesh,
            in_specs=(both, both, P("ep"), both),
            out_specs=(both, P()),
            check_vma=check_vma,
        )
        return jax.eval_shape(with_slopes(run), floats, floats[0], ids)

    assert types("ragged") == types("padded")


def test_placements_change_without_a_new_trace(rng, mesh):
    """The experts move with them: the same output, from the same compiled program."""
    case = CASES["two groups of four"](rng)
    (tokens, gates, experts), ids, old = problem(rng, case, skewed)
    traces = []

    def layer(tokens, gates, experts, ids, placement):
        traces.append(1)
        return moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep",
            **PORTABLE, **ROOM,
        ).out  # fmt: skip

    run = jax.shard_map(layer, mesh=mesh, in_specs=(P("ep"),) * 4 + (P(),), out_specs=P("ep"))
    run = jax.jit(run)
    sharding = jax.sharding.NamedSharding(mesh, P("ep"))
    weights = jax.device_put(in_slots(experts, old), sharding)
    first = run(tokens, gates, weights, ids, old)
    for _ in range(3):
        new = case.placement(rng)
        weights = moe.move_experts(weights, old, new)
        jax.tree.map(np.testing.assert_array_equal, weights, in_slots(experts, new))
        np.testing.assert_allclose(run(tokens, gates, weights, ids, new), first, atol=1e-5)
        old = new
    assert len(traces) == 1


def moves(rng, n_layers=None):
    """Weights in the order of experts, and two placements, possibly stacked."""
    case = CASES["two groups of four"](rng)

    def placement():
        if n_layers is None:
            return case.placement(rng)
        layers = [case.placement(rng) for _ in range(n_layers)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)

    lead = () if n_layers is None else (n_layers,)
    array = rng.normal(0, 1, (*lead, case.n_logical, 3)).astype(np.float32)
    return array, placement(), placement()


def in_layers_slots(array, placement):
    if placement.phy2log.ndim == 1:
        return in_slots(array, placement)
    layers = (jax.tree.map(lambda a, i=i: a[i], placement) for i in range(len(array)))
    return np.stack([in_slots(of, layer) for of, layer in zip(array, layers, strict=True)])


@pytest.mark.parametrize("n_layers", [None, 3, 32])  # there are 32 experts
def test_experts_move_under_every_transformation(rng, n_layers):
    array, old, new = moves(rng, n_layers)
    weights, want = (in_layers_slots(array, placement) for placement in (old, new))
    np.testing.assert_array_equal(moe.move_experts(weights, old, new), want)
    np.testing.assert_array_equal(jax.jit(moe.move_experts)(weights, old, new), want)
    np.testing.assert_array_equal(
        jax.jit(lambda weights: moe.move_experts(weights, old, new))(weights), want
    )
    if n_layers is not None:
        np.testing.assert_array_equal(jax.vmap(moe.move_experts)(weights, old, new), want)
    # Scalars, for all layers or per layer, do not belong to experts.
    count, of_layers = np.int32(7), np.arange(3, dtype=np.int32)
    state = {"count": count, "moments": weights, "step": 3, "none": None}
    if n_layers == 3:
        state["of_layers"] = of_layers
    moved = moe.move_experts(state, old, new)
    assert moved.pop("count") is count
    assert moved.pop("of_layers", of_layers) is of_layers
    assert (moved.pop("step"), moved.pop("none")) == (3, None)
    np.testing.assert_array_equal(moved.pop("moments"), want)
    assert not moved


@pytest.mark.parametrize("n_layers", [None, 3])
@pytest.mark.parametrize("kind", jax.sharding.AxisType)
def test_moved_arrays_stay_sharded(rng, cpu_devices, kind, n_layers):
    """With implicit transfers disallowed; also with explicit axes."""
    if kind == jax.sharding.AxisType.Manual:
        pytest.skip("arrays outside shard_map have no manual axes")
    mesh = Mesh(cpu_devices, "ep", axis_types=(kind,))
    array, old, new = moves(rng, n_layers)
    spec = P("ep") if n_layers is None else P(None, "ep")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    weights = jax.device_put(in_layers_slots(array, old), sharding)
    for placements in ((old, new), jax.device_put((old, new))):
        with jax.transfer_guard("disallow"):
            moved = moe.move_experts(weights, *placements)
        assert moved.sharding == sharding
        np.testing.assert_array_equal(moved, in_layers_slots(array, new))


def test_contradictions_of_moves_are_refused(rng):
    array, old, new = moves(rng)
    stacked, olds, news = moves(rng, 3)

    def refused(words, *arguments):
        with pytest.raises(ValueError, match=words) as raised:
            moe.move_experts(*arguments)
        assert "expected" in str(raised.value)
        assert "got" in str(raised.value)

    refused("^new: .*3 stacked placements of 32 .*got one placement", stacked, olds, new)
    refused("^new: .*one placement of 32 .*got 3 stacked", array, old, news)
    refused(r"^weights: .*\[layers, n_rows, …\] = \[3, 32, …\].*got \[32, 3\]", array, olds, news)
    refused(r"^weights: .*\[n_rows, …\] = \[32, …\].*got \[3, 32, 3\]", stacked, old, new)
    refused(r"^weights: .*got \[3\]", np.zeros(3), old, new)
    twice = np.array(new.phy2log)
    expert = int(twice[0])
    twice[0] = twice[1]
    wrong = dataclasses.replace(new, phy2log=twice)
    words = f"expert {expert} in slot 0, which holds expert {twice[1]}"
    refused(f"^new: .*{words}", array, old, wrong)
    refused(f"^old: .*{words}", array, wrong, new)
    log2phy = np.array(news.log2phy)
    log2phy[1, 5, 0] = -1
    wrong = dataclasses.replace(news, log2phy=log2phy)
    refused("^new: .*expert 5 of layer 1 in slot -1, which does not exist", stacked, olds, wrong)
    # Traced values are unknown; lost experts show as NaN.
    swapped = np.array(new.log2phy)
    swapped[3, 0] = swapped[4, 0]
    wrong = dataclasses.replace(new, log2phy=swapped)
    lost = np.isnan(jax.jit(moe.move_experts)(array, old, wrong)).any(axis=1).sum()
    rank = new.log2phy[3:5, 0] // (new.n_physical // new.ep_size)
    assert lost == (1 if rank[0] == rank[1] else len(array))


BAD = [
    ({"balance": "most"}, ValueError, "^balance: .*got 'most'"),
    ({"capacity_factor": 0.9}, ValueError, "^capacity_factor: .*got 0.9"),
    ({"capacity_factor": float("nan")}, ValueError, "^capacity_factor: .*got nan"),
    ({"transport": "carrier"}, ValueError, "^transport: .*got 'carrier'"),
    ({"gemm": "cublas"}, ValueError, "^gemm: .*got 'cublas'"),
    ({"gemm": "mosaic"}, ValueError, "^gemm: .*got float32, hidden = 16, width = 12"),
    ({"placement": None}, TypeError, "^placement: .*got NoneType"),
    ({"axis_name": "model"}, ValueError, "^axis_name: .*'model'"),
    ({"solver": "magic"}, ValueError, "^solver: .*got 'magic'"),
    ({"indices": np.zeros((8, 3), np.float32)}, TypeError, "^indices: .*got float32"),
    ({"indices": np.zeros(8, np.int32)}, ValueError, r"^gates: .*got \[8, 3\] for indices \[8\]"),
    ({"gates": np.zeros((8, 2), np.float32)}, ValueError, r"^gates: .*got \[8, 2\]"),
    (
        {"gates": np.zeros((8, 3), np.int32)},
        ValueError,
        r"^gates: expected floats.*got int32 \[8, 3\]",
    ),
    ({"tokens": np.zeros((8, 16), jnp.bfloat16)}, TypeError, "^experts: .*bfloat16.*got float32"),
    (
        {"tokens": np.zeros((8, 17), np.float32)},
        ValueError,
        r"^experts: .*hidden = 17.*got \[4, 16, 24\]",
    ),
    ({"tokens": np.zeros((9, 16), np.float32)}, ValueError, r"^assignment: .*with 9 tokens"),
    ({"tokens": np.zeros((8, 16), np.int32)}, ValueError, r"^tokens: .*floats.*int32 \[8, 16\]"),
    *[
        ({name: value}, TypeError, f"^{name}: expected an array, floats .*{got}; make one")
        for name in ("tokens", "gates")
        for value, got in ((None, "NoneType"), ("8", "str"), ([[1.0]], "list"))
    ],
    ({"experts": moe.Experts(None, 1)}, TypeError, r"^experts\.gate_up: .*NoneType"),
    ({"experts": moe.Experts(np.zeros((4, 16, 24)), [1])}, TypeError, r"^experts\.down: .*list"),
    ({"experts": {"w": object()}, "ffn": max}, TypeError, r"^experts\['w'\]: .*got object"),
    ({"ffn": 3}, TypeError, "^ffn: expected a function, got 3"),
    (
        {"experts": moe.Own(moe.Experts(np.zeros((8, 16, 24)), np.zeros((8, 12, 16))))},
        TypeError,
        "^experts: .*float32, got float64",
    ),
    (
        {"experts": moe.Own({"w": np.zeros((8, 16))}), "ffn": max},
        ValueError,
        "^experts: expected the 4 own experts of a rank, got 8",
    ),
    ({"activation": None}, TypeError, "^activation: expected a function, got None"),
    *[
        ({name: value}, TypeError, f"^{name}: expected a static True or False, got")
        for name in ("keep_copies", "in_place")
        for value in ("no", None, np.ones(2, bool))
    ],
    *[
        ({"capacity_factor": value}, TypeError, "^capacity_factor: expected a static number.* got")
        for value in ("2", None, [2.0], np.ones(1), 2j)
    ],
    ({"capacity_factor": float("inf")}, ValueError, "^capacity_factor: .*got inf"),
    ({"n_nodes": "2"}, TypeError, "^n_nodes: expected an integer, got '2'"),
    ({"tile": 1.5}, ValueError, "^tile: expected a static integer .*got 1.5"),
    ({"copies": "batch", "r2o": None, "fan_out": "2"}, ValueError, "^fan_out: .* got '2'"),
    ({"experts": (1, 2)}, TypeError, "^experts: .*got tuple"),
    (
        {
            "experts": moe.Experts(
                np.zeros((5, 16, 24), np.float32), np.zeros((5, 12, 16), np.float32)
            )
        },
        ValueError,
        "^experts: expected the 4 own experts of a rank or its 8 slots, got 5",
    ),
    (
        {
            "experts": moe.Experts(
                np.zeros((8, 16, 24), np.float32), np.zeros((8, 12, 16), np.float32)
            ),
            "balance": "none",
        },
        ValueError,
        "^experts: expected the 4 own experts of a rank, got 8",
    ),
    (
        {"in_place": True},
        ValueError,
        "^experts: .* 4 own experts of a rank and room for 4 .*, got 4, with in_place",
    ),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD)
def test_bad_input(rng, mesh, changed, error, words):
    """At trace time; the message names the argument, what was expected and what it got."""
    case = CASES["cube"](rng)

    def rank(x):
        good = {
            "tokens": jnp.zeros((8, 16)),
            "indices": jnp.zeros((8, 3), jnp.int32),
            "gates": jnp.zeros((8, 3)),
            "experts": moe.Experts(jnp.zeros((4, 16, 24)), jnp.zeros((4, 12, 16))),
            "r2o": case.r2o,
            "placement": case.placement(),
            "axis_name": "ep",
        }
        return moe.moe_layer(**{**good, **changed}).out

    run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(error, match=words) as raised:
        jax.eval_shape(run, jnp.zeros(8))
    assert "expected" in str(raised.value)
    assert "got" in str(raised.value)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("copies", ["placement", "batch"])
@pytest.mark.parametrize(("slots", "n_logical"), [(8, 32), (5, 32), (4, 32), (16, 64)])
def test_a_sharded_placement_is_told(rng, mesh, slots, n_logical, copies, check_vma):
    """A part of it may look like a placement, of fewer experts than there are weights for."""
    placement = AnyCase(8, slots, n_logical).placement(rng)
    ids, weights = jnp.zeros((8, 3), jnp.int32), jnp.zeros((n_logical, 16, 16))

    def rank(x, weights, placement):
        return moe.moe_layer(
            x, ids, jnp.zeros((8, 3)), weights, placement=placement, axis_name="ep",
            ffn=lambda rows, experts, sizes: rows, copies=copies,
        ).out  # fmt: skip

    def traced(specs):
        run = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=P("ep"), check_vma=check_vma)
        return jax.eval_shape(run, jnp.zeros((64, 16)), weights, placement)

    assert traced((P("ep"), P("ep"), P())).shape == (64, 16)
    words = r"^placement: expected .*got .*in_specs P\(\)" if check_vma else "placement"
    with pytest.raises(ValueError, match=words):
        traced((P("ep"), P("ep"), P("ep")))
    if slots < n_logical:
        with pytest.raises(
            ValueError, match=r"^experts: .*got .* shard them with in_specs P\('ep'"
        ):
            traced((P("ep"), P(), P()))


STATIC = {
    "capacity_factor": TypeError,
    "keep_copies": TypeError,
    "in_place": TypeError,
    "n_nodes": TypeError,
    "tile": ValueError,
    "fan_out": ValueError,
}


@pytest.mark.parametrize("name", STATIC)
def test_traced_numbers_are_told(rng, mesh, name):
    """What must be known when the program is traced, given as an argument of the program."""
    placement = AnyCase(8, 4, 19).placement(rng)

    def rank(x, value):
        ids, experts = jnp.zeros((8, 3), jnp.int32), jnp.zeros((3, 16, 16))
        return moe.moe_layer(
            jnp.zeros((8, 16)), ids, jnp.zeros((8, 3)), experts, placement=placement,
            axis_name="ep", ffn=lambda rows, experts, sizes: rows, copies="batch", **{name: value},
        ).out  # fmt: skip

    run = jax.shard_map(rank, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"))
    with pytest.raises(STATIC[name], match=f"^{name}: expected .*, got .*"):
        jax.eval_shape(run, jnp.zeros(8), jnp.float32(2))


@pytest.mark.parametrize(
    "kind", [int, float, np.float32, np.float16, np.int64, np.array, jnp.float32]
)
def test_static_numbers(mesh, kind):
    """Inside shard_map too, where an operation on a scalar of JAX would be traced."""
    sizes, factor = [], kind(2)

    def rank(x):
        sizes.append(moe.capacity_for(40, 8, factor))
        return x

    jax.eval_shape(
        jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")), jnp.zeros(8)
    )
    assert sizes == [moe.capacity_for(40, 8, factor)] == [80]


def test_bad_input_of_the_parts(rng, mesh):
    case = CASES["cube"](rng)
    placement = case.placement()
    ids = jnp.zeros((8, 3), jnp.int32)
    tokens = jnp.zeros((8, 16))

    def refused(error, words, function, *arguments, **options):
        run = jax.shard_map(
            lambda _: function(*arguments, **options), mesh=mesh, in_specs=P("ep"), out_specs=P()
        )
        with pytest.raises(error, match=words) as raised:
            jax.eval_shape(run, jnp.zeros(8))
        assert "expected" in str(raised.value)
        assert "got" in str(raised.value)

    weights = jnp.zeros((4, 2))
    replicate = functools.partial(moe.replicate_weights, weights, case.r2o, "ep")
    for value in (1, "1", [2.0], {"w": 2}):
        refused(TypeError, "^local_weights: .*got ", moe.replicate_weights, value, case.r2o, "ep")
    refused(TypeError, "^in_place: .*got 'yes'", replicate, in_place="yes")
    copies = "^redundants_per_rank: expected"
    refused(ValueError, f"{copies}.*2 columns.*got 3", replicate, redundants_per_rank=3)
    refused(ValueError, f"{copies}.*got 6 with", replicate, redundants_per_rank=6)
    too_many = {"redundants_per_rank": 4, "in_place": True}
    refused(ValueError, f"{copies}.*in place", replicate, **too_many)
    sixteen = topologies.hypercube()
    words = "^axis_name: .*multiple of the group size 16.*size 8"
    refused(ValueError, words, moe.replicate_weights, weights, sixteen, "ep")
    refused(ValueError, "^r2o: ", moe.replicate_weights, weights, np.array([[0], [0]]), "ep")
    placed = functools.partial(moe.replicate_weights, placement=placement)
    refused(ValueError, "^axis_name: .*got None", placed, weights)
    for name in (3, ("ep", "ep"), "data"):
        refused(ValueError, "^axis_name: ", moe.replicate_weights, weights, case.r2o, name)

    some = jnp.zeros((8, 3))

    def dispatch(tokens, assignment, gates=some, capacity=24):
        return moe.dispatch(tokens, gates, assignment, axis_name="ep", capacity=capacity)

    words = "^assignment: .*got ArrayImpl.*positions=True"
    refused(TypeError, words, dispatch, tokens, ids)
    good = Assignment(ids, ids, jnp.zeros(64, jnp.int32))
    refused(ValueError, "^tokens: .*int32", dispatch, ids, good)
    refused(ValueError, r"^tokens: .*got float32 \[0, 16\]", dispatch, tokens[:0], good)
    refused(ValueError, r"^gates: .*\[8, 3\].*\[8, 2\]", dispatch, tokens, good, jnp.zeros((8, 2)))
    refused(ValueError, "^gates: .*floats.*int32", dispatch, tokens, good, ids)
    for capacity in (0, "24", None, 24.0, jnp.int32(24), True):
        refused(ValueError, "^capacity: .*got ", dispatch, tokens, good, capacity=capacity)
    refused(TypeError, "^tokens: .*got NoneType", dispatch, None, good)
    refused(TypeError, "^gates: .*got NoneType", dispatch, tokens, good, None)
    words = r"^assignment\.position: .*got NoneType"
    refused(TypeError, words, dispatch, tokens, good._replace(position=None))
    refused(TypeError, "^rows: .*got NoneType", moe.combine, None, None)
    refused(
        TypeError, r"^plan: expected a lplb_jax\.moe\.Plan, got NoneType", moe.combine, some, None
    )
    for n_rows in (-1, 8.0, "8"):
        refused(ValueError, "^n_rows: .*got ", moe.capacity_for, n_rows, 8, 1.25)
    refused(ValueError, "^ep_size: .*got None", moe.capacity_for, 8, None, 1.25)
    refused(ValueError, "^capacity: .*2³¹.*8 ranks", dispatch, tokens, good, capacity=2**28)
    odd = good._replace(counts=jnp.zeros(63, jnp.int32))
    refused(ValueError, r"^assignment: .*\[63\]", dispatch, tokens, odd)
    experts = moe.Experts(jnp.zeros((4, 16, 24)), jnp.zeros((4, 12, 16)))
    words = r"^group_sizes: .*\[4\].*\[3\]"
    refused(ValueError, words, moe.expert_ffn, tokens, experts, jnp.zeros(3, jnp.int32))
    gated = functools.partial(moe.expert_ffn, tokens, experts, jnp.zeros(4, jnp.int32))
    refused(ValueError, r"^gates: .*\[8\].*\[3\]", gated, gates=jnp.zeros(3))
    refused(TypeError, "^gates: .*got list", gated, gates=[1.0])
    refused(TypeError, "^rows: .*got NoneType", moe.expert_ffn, None, experts, jnp.zeros(4))
    refused(TypeError, "^group_sizes: .*got list", moe.expert_ffn, tokens, experts, [0] * 4)
    with pytest.raises(ValueError, match=r"^weights: .*\[32, …\] or scalars, got \[31\]"):
        moe.move_experts(jnp.zeros(31), placement, placement)
    with pytest.raises(TypeError, match=r"^old: .*got int"):
        moe.move_experts(jnp.zeros(32), 1, placement)
    other = place_experts(None, topologies.ring(4), n_logical=32, ep_size=4, redundants_per_rank=1)
    with pytest.raises(ValueError, match=r"^new: .*32 experts on 8 ranks.*got one .* on 4 ranks"):
        moe.move_experts(jnp.zeros(32), placement, other)


@pytest.fixture
def gpu_mesh():
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    return Mesh(np.array(devices), "ep")


def spoil_memory(mesh):
    """Leaves NaN in memory that is then reused for uninitialized buffers."""
    for device in mesh.devices:
        jax.block_until_ready(jax.device_put(np.full(2**28, np.nan, np.float32), device)).delete()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [None, moe.COMPILER_OPTIONS], ids=["plain", "hidden"])
@pytest.mark.parametrize(
    ("dtype", "gemm", "tolerance"),
    [(np.float32, "xla", 1e-4), (jnp.bfloat16, "mosaic", 3e-2), (jnp.bfloat16, "auto", 3e-2)],
)
@pytest.mark.parametrize("where", ["topology", "anywhere", "copies of the batch"])
def test_gpus_equal_one_device(rng, gpu_mesh, dtype, gemm, tolerance, options, where):
    size = gpu_mesh.size
    case = case_of(size) if where == "topology" else AnyCase(size, 7, 5 * size - 1)
    copies = "batch" if where == "copies of the batch" else "placement"
    spoil_memory(gpu_mesh)
    # In full precision, like the plain mathematics.
    with jax.default_matmul_precision("highest"):
        layer = layer_over(gpu_mesh, case, transport="ragged", gemm=gemm, copies=copies, **ROOM)
        run = with_slopes(layer)
        run = jax.jit(run, compiler_options=options)
        for routing in ROUTINGS:
            n_tokens = 300 * gpu_mesh.size
            floats, ids, placement = problem(rng, case, routing, n_tokens, dtype, (256, 128))
            check = assert_equals_plain_mathematics
            check(run, gpu_mesh, floats, ids, placement, rng, tolerance)


@pytest.mark.gpu
def test_loads_by_the_gpus_themselves(rng, gpu_mesh):
    transport, ours, without = with_and_without_comm(rng, gpu_mesh, case_of(gpu_mesh.size))
    assert transport == "p2p"
    jax.tree.map(np.testing.assert_array_equal, ours, without)


@pytest.mark.gpu
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("balance", ["none", "eplb", "lplb"])
@pytest.mark.parametrize("anywhere", [False, True], ids=["topology", "anywhere"])
def test_transports_give_the_same_bits(rng, gpu_mesh, balance, hide, anywhere):
    """Values and gradients, also if XLA hides collectives and copy engines move the weights."""
    size = gpu_mesh.size
    case = AnyCase(size, 7, 5 * size - 1) if anywhere else case_of(size)
    results = []
    spoil_memory(gpu_mesh)
    (tokens, gates, experts), ids, placement = problem(
        rng, case, skewed, 1000 * gpu_mesh.size, jnp.bfloat16, (256, 128)
    )
    floats = tokens, gates, in_slots(experts, placement)
    for transport in ["ragged", "padded"]:
        layer = layer_over(gpu_mesh, case, transport=transport, balance=balance, **ROOM)
        run = jax.jit(with_slopes(layer), compiler_options=moe.COMPILER_OPTIONS if hide else None)
        results.append(run(floats, tokens.astype(np.float32), ids, placement))
    jax.tree.map(np.testing.assert_array_equal, *results)
