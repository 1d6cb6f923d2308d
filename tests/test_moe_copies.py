"""The layer with copies chosen for the batch: only speed depends on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import n_compiled
from moe_checks import (
    HIDDEN,
    ROOM,
    ROUTINGS,
    WIDTH,
    AnyCase,
    assert_equals_plain_mathematics,
    balanced,
    in_slots,
    layer_over,
    plainly,
    problem,
    ragged_by_gather,
    skewed,
    with_slopes,
)

from lplb_jax import Placement, Status, metrics, moe, place_copies, topologies

CASE = AnyCase(8, 4, 19)
BATCH: dict[str, Any] = {"copies": "batch", "transport": "padded", "gemm": "xla", **ROOM}


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices, "ep")


def by_rank(problem):
    """The layer's arguments for a problem."""
    (tokens, gates, experts), ids, placement = problem
    return (tokens, gates, in_slots(experts, placement)), ids, placement


def assert_chosen(traffic, ids, placement, fan_out=None):
    """The copies are place_copies', and the busiest rank has the least load that they allow."""
    counts = np.bincount(ids[ids >= 0], minlength=placement.n_logical).astype(np.int32)
    expected = place_copies(counts, placement, fan_out=fan_out)
    np.testing.assert_array_equal(traffic.phy2log, expected.phy2log)
    of_experts = np.zeros_like(counts)
    filled = traffic.phy2log >= 0
    np.add.at(of_experts, traffic.phy2log[filled], traffic.slot_loads[filled])
    np.testing.assert_array_equal(of_experts, counts)
    assert not traffic.slot_loads[~filled].any()
    loads = metrics.rank_loads(traffic.slot_loads, placement.ep_size)
    assert loads.max() == traffic.lower_bound[0]
    n_slots = placement.n_physical // placement.ep_size
    home = placement.log2phy[:, 0] // n_slots
    alone = np.bincount(home, counts, placement.ep_size)
    assert traffic.copies.rows_saved == alone.max() - loads.max()
    used = traffic.slot_loads > 0
    away = used & (home[traffic.phy2log] != np.arange(len(used)) // n_slots)
    np.testing.assert_array_equal(
        traffic.copies.received, away.reshape(placement.ep_size, -1).sum(1)
    )
    assert traffic.copies.sent.sum() == away.sum()
    assert not traffic.status.any()
    assert traffic.overflow == 0


def in_room(experts, n_local, room):
    """The ranks' own experts, each rank's followed by NaN."""

    def roomy(array):
        array = array.reshape(8, n_local, *array.shape[1:])
        nan = np.full((8, room, *array.shape[2:]), np.nan, array.dtype)
        return np.concatenate([array, nan], axis=1).reshape(-1, *array.shape[2:])

    return jax.tree.map(roomy, experts)


@pytest.mark.parametrize("of_copies", ["batch", "placement"])
@pytest.mark.parametrize("transport", ["ragged", "padded"])
def test_in_place(rng, mesh, monkeypatch, transport, of_copies):
    """The same bits as with new arrays; room comes back with the copies, and has no gradient."""
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    n_local, room = 3, 4

    def run(in_place):
        options = {**BATCH, "copies": of_copies, "transport": transport, "in_place": in_place}

        def rank(tokens, gates, experts, ids, placement):
            out, traffic, *rest = moe.moe_layer(
                tokens, ids, gates, experts, placement=placement, axis_name="ep", **options
            )
            return out, (traffic, *rest)

        specs = (P("ep"), P("ep"), P("ep"), P("ep"), P())
        given = (P("ep"), (P(), P("ep")) if in_place else (P(),))
        return with_slopes(
            jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=given, check_vma=False)
        )

    steps = {in_place: run(in_place) for in_place in (False, True)}
    for routing in ROUTINGS:
        (tokens, gates, own), ids, placement = by_rank(problem(rng, CASE, routing))
        upstream = rng.normal(0, 1, tokens.shape).astype(np.float32)
        want, (*slopes, of_own), (traffic,) = steps[False](
            (tokens, gates, own), upstream, ids, placement
        )
        roomy = in_room(own, n_local, room)
        got, (*others, of_rows), (same, filled) = steps[True](
            (tokens, gates, roomy), upstream, ids, placement
        )
        jax.tree.map(np.testing.assert_array_equal, (got, *others, same), (want, *slopes, traffic))
        held = np.asarray(traffic.phy2log).reshape(8, -1)
        loads = np.asarray(traffic.slot_loads).reshape(8, -1)
        for rank in range(8):
            homes = np.sort(placement.log2phy[placement.log2phy[:, 0] // 4 == rank, 0]) % 4
            at = np.setdiff1d(np.flatnonzero(held[rank] >= 0), homes)
            for row, slot in enumerate(at):
                if loads[rank, slot]:
                    expert = held[rank, slot]
                    home = placement.log2phy[expert, 0]
                    first = np.flatnonzero(placement.log2phy[:, 0] // 4 == home // 4)
                    nth = (placement.log2phy[first, 0] < home).sum()
                    for ours, array in zip(filled, own, strict=True):
                        copy = np.asarray(ours).reshape(8, n_local + room, *array.shape[1:])[rank]
                        source = array.reshape(8, n_local, *array.shape[1:])[home // 4, nth]
                        np.testing.assert_array_equal(copy[n_local + row], source)
        for ours, theirs in zip(of_rows, of_own, strict=True):
            ours = np.asarray(ours).reshape(8, n_local + room, *theirs.shape[1:])
            theirs = np.asarray(theirs).reshape(8, n_local, *theirs.shape[1:])
            np.testing.assert_array_equal(ours[:, :n_local], theirs)
            assert not ours[:, n_local:].any()


@pytest.mark.parametrize(
    ("transport", "again", "n_nodes"),
    [("ragged", "copies", None), ("padded", "layer", None), ("ragged", "layer", 4)],
)
def test_equals_one_device(rng, mesh, monkeypatch, transport, again, n_nodes):
    """All routings, including ranks without tokens, and placements through one program, whose
    backward pass fetches the copies again, or even chooses them again; copies relayed by one rank
    of a node."""
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    options = {"transport": transport, "keep_copies": again == "layer", "n_nodes": n_nodes}
    options = {**BATCH, **options}
    layer = layer_over(mesh, CASE, check_vma=transport == "padded", **options)
    run = with_slopes(jax.checkpoint(layer) if again == "layer" else layer)
    for routing in ROUTINGS:
        floats, ids, placement = problem(rng, CASE, routing)
        traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-5)
        assert_chosen(traffic, ids, placement)
    assert n_compiled(run) == 1


def check_full_room(rng, mesh, **options):
    """All other ranks have copies of everything that rank 0 owns, and use them: the most gradients
    possible come home."""
    n_ranks, n_local = mesh.size, 6
    table = np.full((n_ranks, 2 * n_local), -1, np.int32)
    table[:, :n_local] = np.arange(n_ranks * n_local).reshape(n_ranks, n_local)
    table[1:, n_local:] = table[0, :n_local]
    placement = Placement.from_phy2log(table, ep_size=n_ranks)
    case = AnyCase(n_ranks, 2 * n_local, n_ranks * n_local)
    floats, ids, _ = problem(rng, case, balanced, 256 * n_ranks)
    run = with_slopes(layer_over(mesh, case, balance="eplb", gemm="xla", **ROOM, **options))
    traffic = assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, 1e-4)
    assert traffic.copies.received.tolist() == [0] + [n_local] * (n_ranks - 1)
    assert traffic.copies.sent[0] == n_local * min(n_ranks - 1, 4)


def test_as_many_gradients_as_can_come_home(rng, mesh, monkeypatch):
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    check_full_room(rng, mesh, transport="ragged", check_vma=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_as_many_gradients_as_can_come_home_on_gpus(rng):
    with jax.default_matmul_precision("highest"):
        check_full_room(rng, Mesh(np.array(jax.devices("gpu")), "ep"), transport="ragged")


def test_of_a_placement_along_a_topology(rng, mesh):
    """Own experts stay at home; the limit on copies sent by a rank is kept."""
    case = Case(topologies.cube(), 5, combined=2)
    floats, ids, placement = problem(rng, case, skewed)
    layer = jax.jit(layer_over(mesh, AnyCase(8, 7, 40), fan_out=1, **BATCH))
    out, traffic = layer(*floats[:2], in_slots(floats[2], placement), ids, placement)
    np.testing.assert_allclose(out, plainly(*floats, ids), atol=1e-4)
    assert_chosen(jax.tree.map(np.asarray, traffic), ids, placement, fan_out=1)


def test_copies_that_are_fetched_again_are_not_kept(rng, mesh):
    """Residuals of the backward pass hold the weights of all rows, or only of homes."""
    floats, ids, placement = by_rank(problem(rng, CASE, skewed))

    def kept(keep_copies):
        layer = layer_over(mesh, CASE, keep_copies=keep_copies, **BATCH)
        run = jax.jit(lambda *floats: layer(*floats, ids, placement)[0])
        pull = jax.eval_shape(lambda *floats: jax.vjp(run, *floats)[1], *floats)
        return {leaf.shape for leaf in jax.tree.leaves(pull)}

    of_rows = {(8 * 7, HIDDEN, 2 * WIDTH), (8 * 7, WIDTH, HIDDEN)}  # own experts, and room
    assert of_rows <= kept(True)
    assert not of_rows & kept(False)


def kept_and_fetched_again(rng, mesh, problem, options, **of_layer):
    """Compares value, gradients and traffic."""
    floats, ids, placement = by_rank(problem)
    upstream = rng.normal(0, 1, floats[0].shape).astype(np.float32)
    for keep_copies in (True, False):
        layer = layer_over(mesh, CASE, keep_copies=keep_copies, **of_layer)
        run = jax.jit(with_slopes(layer), compiler_options=options)
        yield run(floats, upstream, ids, placement)


@pytest.mark.parametrize(
    ("of_copies", "transport", "n_nodes"), [("batch", "ragged", 4), ("placement", "padded", None)]
)
def test_fetched_again_they_give_the_same_bits(
    rng, mesh, monkeypatch, of_copies, transport, n_nodes
):
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    options = {**BATCH, "copies": of_copies, "transport": transport, "n_nodes": n_nodes}
    jax.tree.map(
        np.testing.assert_array_equal,
        *kept_and_fetched_again(
            rng, mesh, problem(rng, CASE, skewed), None, check_vma=False, **options
        ),
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("options", [None, moe.COMPILER_OPTIONS], ids=["plain", "hidden"])
@pytest.mark.parametrize("gemm", ["xla", "mosaic"])
@pytest.mark.parametrize("of_copies", ["batch", "placement"])
def test_fetched_again_they_give_the_same_bits_on_gpus(rng, of_copies, gemm, options):
    """Also if XLA schedules each of the two fetches to hide it."""
    mesh = Mesh(np.array(jax.devices("gpu")), "ep")
    case = AnyCase(mesh.size, 7, 5 * mesh.size - 1)
    drawn = problem(rng, case, skewed, 1000 * mesh.size, jnp.bfloat16, (256, 128))
    of_layer = {**BATCH, "copies": of_copies, "transport": "ragged", "gemm": gemm}
    jax.tree.map(
        np.testing.assert_array_equal,
        *kept_and_fetched_again(rng, mesh, drawn, options, **of_layer),
    )


def test_strict_modes(rng, mesh):
    """All at once: the same bits, whether or not copies are kept."""
    floats, ids, placement = by_rank(problem(rng, CASE, skewed, dtype=jnp.bfloat16))

    def run(keep_copies):
        layer = with_slopes(layer_over(mesh, CASE, keep_copies=keep_copies, **BATCH))
        return layer(floats, np.ones(floats[0].shape, np.float32), ids, placement)

    want = run(keep_copies=True)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        got = run(keep_copies=False)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("keep_copies", [True, False])
def test_the_ragged_transport_has_the_same_types(rng, cpu_devices, keep_copies):
    """Experts vary over fewer axes than tokens do."""
    mesh, case = Mesh(cpu_devices.reshape(2, 4), ("data", "ep")), AnyCase(4, 9, 30)
    (tokens, gates, experts), ids, placement = by_rank(problem(rng, case, skewed, 64))
    both = P(("data", "ep"))

    def types(transport):
        options = {**BATCH, "transport": transport, "keep_copies": keep_copies}

        def rank(tokens, gates, experts, ids, placement):
            return moe.moe_layer(
                tokens, ids, gates, experts, placement=placement, axis_name="ep", **options
            ).out

        specs = {"in_specs": (both, both, P("ep"), both, P()), "out_specs": both}
        function = with_slopes(
            lambda *arguments: (jax.shard_map(rank, mesh=mesh, **specs)(*arguments), None)
        )
        arguments = (tokens, gates, experts), tokens, ids, placement
        return jax.eval_shape(function, *arguments)

    assert types("ragged") == types("padded")


def test_bad_arguments(rng, mesh):
    floats, ids, placement = by_rank(problem(rng, CASE, skewed))
    slots = jax.tree.map(lambda array: np.resize(array, (32, *array.shape[1:])), floats[2])
    for experts, words, options in (
        (floats[2], "^copies: .*got 'all'", {"copies": "all"}),
        (
            floats[2],
            "^balance: expected 'lplb' with copies='batch', got 'eplb'",
            {"balance": "eplb"},
        ),
        (floats[2], "^fan_out: .*got 0", {"fan_out": 0}),
        (floats[2], "^fan_out: .*got 3", {"copies": "placement", "fan_out": 3}),
        (floats[2], "^r2o: expected None with copies='batch'", {"r2o": topologies.cube()}),
        (
            floats[2],
            "^experts: expected the 3 own experts of a rank and room for 4 copies, got 3, with in_",
            {"in_place": True},
        ),
        (slots, "^experts: expected the 3 own experts of a rank, got", {}),
        (
            floats[2],
            "^keep_copies: expected True",
            {"copies": "placement", "balance": "none", "keep_copies": False},
        ),
    ):

        def rank(tokens, gates, experts, ids, options=options):
            options = {"placement": placement, "axis_name": "ep", **BATCH, **options}
            return moe.moe_layer(tokens, ids, gates, experts, **options).out

        run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(run, *floats[:2], experts, ids)


def crowded_placement():
    """A rank is home of four experts, and has rows for three."""
    table = np.full((8, 4), -1, np.int32)
    table.ravel()[:19] = np.arange(19)
    return Placement.from_phy2log(table, ep_size=8)


HOMES: dict[str, dict[str, Any]] = {
    "copies of the batch": {"copies": "batch"},
    "those that there are": {},
    "even": {"balance": "eplb"},
    "none": {"balance": "none"},
}


@pytest.mark.parametrize("options", HOMES.values(), ids=HOMES)
def test_homes_that_do_not_fit_are_told(rng, mesh, options):
    """A known placement is refused; a traced one gives no results, and a status."""
    floats, ids, _ = by_rank(problem(rng, CASE, skewed))
    options = {"axis_name": "ep", "transport": "padded", "gemm": "xla", **ROOM, **options}

    def rank(tokens, gates, experts, ids, placement):
        options["placement"] = placement
        out, traffic = moe.moe_layer(tokens, ids, gates, moe.Own(experts), **options)
        return out, traffic.status

    specs = (P("ep"), P("ep"), P("ep"), P("ep"), P())
    run = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=(P("ep"), P()))
    known = jax.shard_map(
        lambda *arguments: rank(*arguments, crowded_placement())[0],
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    with pytest.raises(ValueError, match=r"^placement: .*at most 3 experts, got 4 on rank 0"):
        jax.eval_shape(known, *floats, ids)
    out, status = jax.jit(run)(*floats, ids, crowded_placement())
    assert all(status & Status.BAD_PLACEMENT)
    assert np.isnan(out).any()


def test_weights_in_slots_need_no_even_homes(rng, mesh):
    """Nor does `rebalance`: every slot's weights are there."""
    placement = crowded_placement()
    floats, ids, _ = problem(rng, CASE, skewed)
    tokens, gates, experts = floats

    def of_slots(array):
        there = (placement.phy2log >= 0).reshape(-1, *[1] * (array.ndim - 1))
        return np.where(there, array[placement.phy2log], 0)

    def rank(tokens, gates, experts, ids, placement):
        return moe.moe_layer(
            tokens,
            ids,
            gates,
            moe.InSlots(experts),
            placement=placement,
            axis_name="ep",
            transport="padded",
            gemm="xla",
            **ROOM,
        )

    specs = (P("ep"), P("ep"), P("ep"), P("ep"), P())
    given = moe.LayerResult(P("ep"), P())
    run = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=given)
    out, traffic = jax.jit(run)(tokens, gates, jax.tree.map(of_slots, experts), ids, placement)
    assert not traffic.status.any()
    np.testing.assert_allclose(out, plainly(tokens, gates, experts, ids), rtol=1e-4, atol=1e-5)
