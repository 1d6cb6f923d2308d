"""moe_layer with user networks, against one device: biases, integers, fp8, no gate."""

import functools
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
    TOP_K,
    WIDTH,
    AnyCase,
    in_slots,
    one_expert,
    ragged_by_gather,
    skewed,
)

from lplb_jax import moe, topologies
from lplb_jax.moe import products as products_module
from lplb_jax.moe.slots import room_for

CUBE = Case(topologies.cube(), 5, combined=2)
ANY = AnyCase(8, 4, 19)


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices, "ep")


def normal(rng, *shape):
    return rng.normal(0, 1, shape).astype(np.float32)


class Biased:
    """Like gpt-oss: alternating gate and up columns, clamped, with biases."""

    @staticmethod
    def make(rng, n):
        return {
            "in": {"kernel": normal(rng, n, HIDDEN, 2 * WIDTH), "bias": normal(rng, n, 2 * WIDTH)},
            "out": {"kernel": normal(rng, n, WIDTH, HIDDEN), "bias": normal(rng, n, HIDDEN)},
        }

    @staticmethod
    def units(both):
        gate, up = jnp.minimum(both[..., ::2], 7), jnp.clip(both[..., 1::2], -7, 7)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)

    @staticmethod
    def ffn(rows, experts, group_sizes):
        def linear(x, layer):
            bias = moe.per_row(layer["bias"], group_sizes, len(x))
            return moe.grouped_dot(x, layer["kernel"], group_sizes) + bias

        return linear(Biased.units(linear(rows, experts["in"])), experts["out"])

    @staticmethod
    def plain(x, expert):
        hidden = Biased.units(x @ expert["in"]["kernel"] + expert["in"]["bias"])
        return hidden @ expert["out"]["kernel"] + expert["out"]["bias"]


class Quantised:
    """8-bit weights, with one scale per column and one number per expert."""

    dtype: Any

    @classmethod
    def make(cls, rng, n):
        def matrix(*shape):
            return np.asarray(10 * normal(rng, *shape)).astype(cls.dtype)

        return [
            (matrix(n, HIDDEN, WIDTH), normal(rng, n, WIDTH) / 30),
            (matrix(n, WIDTH, HIDDEN), normal(rng, n, HIDDEN) / 30),
            normal(rng, n),
        ]

    @staticmethod
    def ffn(rows, experts, group_sizes):
        first, last, number = experts

        def linear(x, weights, scales):
            scales = moe.per_row(scales, group_sizes, len(x))
            return moe.grouped_dot(x, weights, group_sizes) * scales

        hidden = jax.nn.silu(linear(rows, *first))
        return linear(hidden, *last) * moe.per_row(number, group_sizes, len(rows))[:, None]

    @staticmethod
    def plain(x, expert):
        first, last, number = expert

        def linear(x, weights, scales):
            return x @ (weights.astype(np.float32) * scales)

        return linear(jax.nn.silu(linear(x, *first)), *last) * number


class Int8(Quantised):
    """Integer weights, which take no gradient."""

    dtype = jnp.int8


class Fp8(Quantised):
    """fp8 weights, whose gradients are also 8-bit."""

    dtype = jnp.float8_e4m3fn


class Loop:
    """Without this library's functions: a mask per slot, and its own width."""

    @staticmethod
    def make(rng, n):
        return (normal(rng, n, HIDDEN, 5),)

    @staticmethod
    def ffn(rows, experts, group_sizes):
        ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
        row = jnp.arange(len(rows), dtype=jnp.int32)[:, None]
        out = jnp.zeros((len(rows), 5))
        for weights, end, size in zip(*experts, ends, group_sizes, strict=True):
            out += jnp.where((row >= end - size) & (row < end), jnp.sin(rows) @ weights, 0)
        return out + jnp.nan * (row >= ends[-1])  # must not matter

    @staticmethod
    def plain(x, expert):
        return jnp.sin(x) @ expert[0]


def layer_of(mesh, case, network, *, early=False, transport="padded", **options):
    options = {"axis_name": "ep", "transport": transport, "ffn": network.ffn, **ROOM, **options}

    def rank(tokens, gates, experts, ids, placement):
        if early:
            experts = moe.replicate_weights(experts, axis_name="ep", placement=placement)
        result = moe.moe_layer(tokens, ids, gates, experts, placement=placement, **options)
        return result.out, result.traffic

    return jax.shard_map(
        rank, mesh=mesh, in_specs=(P("ep"), P("ep"), P("ep"), P("ep"), P()),
        out_specs=(P("ep"), P()), check_vma=transport == "padded",
    )  # fmt: skip


def slopes_of(function):
    """jit of (floats, upstream, …) -> output, gradients and other results."""

    def loss(floats, upstream, *others):
        out, aux = function(*floats, *others)
        return (out * upstream).sum(), (out, aux)

    def run(*arguments):
        pulled = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        (_, (out, aux)), slopes = pulled(*arguments)
        return out, slopes, aux

    return jax.jit(run)


def plain_layer(network):
    """Runs every token through every expert and selects the choices."""

    def layer(tokens, gates, experts, ids):
        of_expert = jax.vmap(lambda expert: network.plain(tokens, expert))(experts)
        chosen = jax.nn.one_hot(ids, len(of_expert), dtype=gates.dtype)
        return jnp.einsum("tk,tke,eth->th", gates, chosen, of_expert), None

    return slopes_of(layer)


def room_behind(experts, placement):
    """Room for the copies that a rank may have."""
    along = placement.topology is not None
    n = placement.redundants_per_rank if along else room_for(placement)

    def roomy(array):
        by_rank = array.reshape(8, -1, *array.shape[1:])
        room = [(0, 0), (0, n), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(by_rank, room).reshape(-1, *array.shape[1:])

    return jax.tree.map(roomy, experts)


def assert_equals_one_device(rng, mesh, case, network, **options):
    """Value and gradients, for several routings and placements of one program."""
    run = slopes_of(layer_of(mesh, case, network, **options))
    plain = plain_layer(network)
    for routing in (skewed, one_expert):
        placement = case.placement(rng)
        experts = network.make(rng, case.n_logical)
        ids = routing(rng, case, 64).astype(np.int32)
        tokens, gates = normal(rng, 64, HIDDEN), rng.random((64, TOP_K)).astype(np.float32)
        own = in_slots(experts, placement)
        if options.get("in_place"):
            own = room_behind(own, placement)
        shape = jax.eval_shape(plain, (tokens, gates, experts), np.float32(0), ids)[0]
        want, _, _ = plain((tokens, gates, experts), jnp.zeros_like(shape), ids)
        # Along the output, so that the gradient of an expert's one number, a sum over all its
        # rows, does not cancel: else its rounding has no relation to its size.
        upstream = want / want.std() * rng.uniform(0.5, 1.5, want.shape).astype(np.float32)
        want, (*slopes, of_experts), _ = plain((tokens, gates, experts), upstream, ids)
        got, (*ours, of_own), traffic = run((tokens, gates, own), upstream, ids, placement)
        assert traffic.overflow == 0
        assert_close("output", got, want)
        assert_close("tokens", ours[0], slopes[0])
        assert_close("gates", ours[1], slopes[1])
        leaves = jax.tree_util.tree_leaves_with_path(of_experts)
        for (path, expected), slope in zip(leaves, jax.tree.leaves(of_own), strict=True):
            if expected.dtype == jax.dtypes.float0:
                assert slope.dtype == expected.dtype
                continue
            expected = in_slots(np.asarray(expected), placement)
            if options.get("in_place"):
                expected = room_behind(expected, placement)
            assert slope.dtype == expected.dtype
            # Sums of several 4-bit numbers.
            tolerance = 0.2 if slope.dtype.itemsize == 1 else 1e-5
            assert_close(jax.tree_util.keystr(path), slope, expected, tolerance)
    assert n_compiled(run) == 1


def assert_close(name, got, want, tolerance=1e-5):
    got, want = (np.asarray(array, np.float32) for array in (got, want))
    scale = max(np.abs(want).max(), 1e-6)
    np.testing.assert_allclose(got / scale, want / scale, atol=tolerance, err_msg=name)


AGAIN = {"copies": "batch", "keep_copies": False}
IN_PLACE = {"in_place": True}


@pytest.mark.parametrize(
    ("network", "case", "options"),
    [
        (Biased, CUBE, {}),
        (Int8, CUBE, IN_PLACE),
        (Fp8, CUBE, {"early": True}),
        (Loop, CUBE, {"balance": "none"}),
        (Int8, ANY, {}),
        (Biased, ANY, AGAIN),
        (Biased, ANY, {**IN_PLACE, "copies": "batch"}),
        (Int8, ANY, {**IN_PLACE, "copies": "batch"}),
        (Fp8, ANY, IN_PLACE),
        (Fp8, ANY, {"copies": "batch"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_equals_one_device(rng, mesh, network, case, options):
    assert_equals_one_device(rng, mesh, case, network, **options)


@pytest.mark.parametrize(
    ("network", "options"),
    [(Fp8, AGAIN), (Int8, {**IN_PLACE, "copies": "batch", "n_nodes": 2}), (Biased, IN_PLACE)],
    ids=["again", "batch, in place", "any, in place"],
)
def test_equals_one_device_by_the_ragged_transport(rng, mesh, monkeypatch, network, options):
    monkeypatch.setattr("lplb_jax.moe.ragged.all_to_all", ragged_by_gather)
    assert_equals_one_device(rng, mesh, ANY, network, transport="ragged", **options)


def test_what_is_kept_for_the_backward_pass(rng, mesh):
    """Neither copies nor their converted values are kept if they are fetched again."""
    placement = ANY.placement(rng)
    own = in_slots(Int8.make(rng, ANY.n_logical), placement)
    ids = skewed(rng, ANY, 64).astype(np.int32)
    tokens, gates = normal(rng, 64, HIDDEN), normal(rng, 64, TOP_K)

    def kept(keep_copies):
        layer = layer_of(mesh, ANY, Int8, copies="batch", keep_copies=keep_copies)
        run = jax.jit(lambda *floats: layer(*floats, ids, placement)[0])
        pull = jax.eval_shape(lambda *floats: jax.vjp(run, *floats)[1], tokens, gates, own)
        return {leaf.shape for leaf in jax.tree.leaves(pull)}

    of_rows = {(8 * 7, HIDDEN, WIDTH), (8 * 7, WIDTH, HIDDEN)}  # own experts, and room
    assert of_rows <= kept(True)
    assert not of_rows & kept(False)


def test_what_experts_share_is_closed_over(rng, mesh):
    """It gets its gradient, also if copies are fetched again."""
    placement = ANY.placement(rng)
    ids = skewed(rng, ANY, 64).astype(np.int32)
    (weights,) = Loop.make(rng, ANY.n_logical)
    tokens, gates = normal(rng, 64, HIDDEN), rng.random((64, TOP_K)).astype(np.float32)
    shared = normal(rng, HIDDEN)

    def rank(tokens, gates, weights, shared, ids):
        def ffn(rows, experts, group_sizes):
            return moe.grouped_dot(rows * shared, experts, group_sizes)

        return moe.moe_layer(
            tokens, ids, gates, weights, placement=placement, axis_name="ep", ffn=ffn,
            transport="padded", keep_copies=False, **ROOM,
        ).out  # fmt: skip

    sharded = P("ep"), P("ep"), P("ep"), P(), P("ep")
    layer = jax.shard_map(rank, mesh=mesh, in_specs=sharded, out_specs=P("ep"))

    def plain(shared):
        of_expert = jnp.einsum("th,ehn->etn", tokens * shared, weights)
        chosen = jax.nn.one_hot(ids, len(weights), dtype=gates.dtype)
        return jnp.einsum("tk,tke,etn->tn", gates, chosen, of_expert)

    own = in_slots(weights, placement)
    upstream = normal(rng, 64, 5)
    layer = jax.jit(layer)
    got, pull = jax.vjp(lambda shared: layer(tokens, gates, own, shared, ids), shared)
    want, plain_pull = jax.vjp(plain, shared)
    assert_close("output", got, want)
    assert_close("shared", *pull(upstream), *plain_pull(upstream))


def test_a_diverged_expert_reaches_its_own_tokens_only(rng, mesh):
    """All else keeps its bits, gradients too."""
    placement, ids = CUBE.placement(rng), skewed(rng, CUBE, 64).astype(np.int32)
    experts = Biased.make(rng, CUBE.n_logical)
    tokens, gates = normal(rng, 64, HIDDEN), normal(rng, 64, TOP_K)
    run = slopes_of(layer_of(mesh, CUBE, Biased))

    def outcome(experts):
        own = in_slots(experts, placement)
        out, (of_tokens, _, of_own), _ = run((tokens, gates, own), tokens, ids, placement)
        return np.asarray(out), np.asarray(of_tokens), of_own

    out, of_tokens, of_own = outcome(experts)
    diverged = int(ids[ids >= 0][0])
    for group in experts.values():
        for array in group.values():
            array[diverged] = np.nan
    spoiled, of_tokens_then, of_own_then = outcome(experts)
    others = ~(ids == diverged).any(axis=1)
    assert others.any()
    assert np.isnan(spoiled[~others]).any(axis=1).all()
    np.testing.assert_array_equal(spoiled[others], out[others])
    np.testing.assert_array_equal(of_tokens_then[others], of_tokens[others])
    chosen_with_it = np.unique(ids[~others])
    untouched = np.setdiff1d(np.arange(CUBE.n_logical), chosen_with_it)
    mine = in_slots(np.isin(np.arange(CUBE.n_logical), untouched), placement)
    for then, before in zip(*map(jax.tree.leaves, (of_own_then, of_own)), strict=True):
        np.testing.assert_array_equal(np.asarray(then)[mine], np.asarray(before)[mine])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e5m2])
def test_the_parts_have_true_derivatives(rng, dtype):
    """Groups of all sizes; rows past the last group and their gradients hold arbitrary values."""
    n_rows, n_groups, k, n = 300, 6, 4, 3
    rows_dtype = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    cuts = np.sort(rng.integers(0, n_rows + 1, n_groups + 1))
    sizes = np.diff(cuts).astype(np.int32)
    sizes[rng.integers(n_groups)] = 0
    used, group = sizes.sum(), np.repeat(np.arange(n_groups), sizes)
    rows = rng.integers(-3, 4, (n_rows, k)).astype(rows_dtype)  # sums are exact
    slope = rng.integers(-1, 2, (n_rows, n)).astype(rows_dtype)
    rows[used:] = slope[used:] = np.nan
    weights, bias = (
        rng.integers(-2, 3, shape).astype(dtype) for shape in ((n_groups, k, n), (n_groups, n))
    )
    sizes = jnp.asarray(sizes)

    def ours(rows, weights, bias):
        of_rows = moe.per_row(bias, sizes, n_rows).astype(rows.dtype)
        return moe.grouped_dot(rows, weights, sizes) + of_rows

    def plain(rows, weights, bias):
        wide = weights.astype(jnp.float32)[group]
        out = jnp.einsum("mk,mkn->mn", rows[:used].astype(jnp.float32), wide)
        return (out + bias.astype(jnp.float32)[group]).astype(rows.dtype)

    got, pull = jax.vjp(jax.jit(ours), rows, weights, bias)
    want, plain_pull = jax.vjp(jax.jit(plain), rows, weights, bias)
    assert got.dtype == rows_dtype
    np.testing.assert_array_equal(got[:used], want)
    assert not got[used:].any()
    of_rows, *others = pull(jnp.asarray(slope))
    expected, *of_others = plain_pull(jnp.asarray(slope[:used]))
    np.testing.assert_array_equal(of_rows, expected)
    for a, b in zip(others, of_others, strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(a, b)


def test_sums_of_biases_by_the_kernel(rng, monkeypatch):
    """As on Hopper, with a stand-in product of the same shapes."""
    calls = []

    def of_weights(rows, slope, sizes):
        calls.append(rows.shape)
        return products_module.XLA.of_weights(rows, slope, sizes)

    kernels = products_module.MOSAIC._replace(of_weights=of_weights)
    monkeypatch.setattr(products_module, "MOSAIC", kernels)
    monkeypatch.setattr(products_module, "_has_wgmma", lambda: True)
    sizes = jnp.array([70, 0, 100], jnp.int32)
    slope = rng.integers(-1, 2, (200, 128)).astype(jnp.bfloat16)
    slope[170:] = np.nan
    expanded = jax.jit(lambda v: moe.per_row(v, sizes, 200))
    _, pull = jax.vjp(expanded, jnp.zeros((3, 128), jnp.bfloat16))
    pairs = zip(np.cumsum(sizes), sizes, strict=True)
    want = [slope[end - size : end].astype(np.float32).sum(0) for end, size in pairs]
    np.testing.assert_array_equal(np.asarray(pull(jnp.asarray(slope))[0], np.float32), want)
    assert calls == [(200, 128)]


def test_strict_modes(rng, mesh):
    """All at once: the same types."""
    placement, ids = ANY.placement(rng), skewed(rng, ANY, 64).astype(np.int32)
    tokens, gates = normal(rng, 64, HIDDEN), normal(rng, 64, TOP_K)
    own = in_slots(Int8.make(rng, ANY.n_logical), placement)

    def types():
        layer = slopes_of(layer_of(mesh, ANY, Int8, copies="batch"))
        return jax.eval_shape(layer, (tokens, gates, own), tokens, ids, placement)

    want = types()
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        assert types() == want


def zero(rows, experts, group_sizes):
    return rows


GOOD = (np.zeros((5, HIDDEN, 4), np.float32),)
BAD = {
    "no leaves": ({"experts": ()}, "^experts: expected a pytree with arrays.*got one without"),
    "a scalar": ({"experts": {"a": GOOD[0], "b": 1.0}}, r"^experts: .*got \[\] for experts\['b'\]"),
    "two lengths": ({"experts": [GOOD[0], np.zeros(4)]}, r"^experts: .*got \[4\] for experts\[1\]"),
    "length": ({"experts": np.zeros(6)}, "^experts: expected the 5 own .* got 6"),
    "gemm": ({"gemm": "xla"}, "^gemm: expected none where ffn is given, got 'xla'"),
    "activation": ({"activation": jnp.tanh}, "^activation: expected none where ffn"),
    "nothing": ({"ffn": lambda *_: None}, "^ffn: .*got NoneType"),
    "rows": ({"ffn": lambda rows, *_: rows[1:]}, r"^ffn: expected .*\[n_rows, …\].*got \["),
    "rank": ({"ffn": lambda rows, *_: rows[:, 0]}, "^ffn: expected it to return"),
    "integers": (
        {"ffn": lambda rows, *_: rows.astype(jnp.int32)},
        "^ffn: expected floats.*got int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(rng, mesh, name):
    changed, words = BAD[name]
    options = {"experts": GOOD, "ffn": zero, **changed}

    def rank(tokens, gates, ids):
        return moe.moe_layer(
            tokens, ids, gates, options["experts"], placement=CUBE.placement(), axis_name="ep",
            **{name: value for name, value in options.items() if name != "experts"},
        ).out  # fmt: skip

    run = jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    arrays = jnp.zeros((64, HIDDEN)), jnp.zeros((64, TOP_K)), jnp.zeros((64, TOP_K), jnp.int32)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, *arrays)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, w, n: moe.grouped_dot(x[0], w, n), "^rows: expected floats"),
        (lambda x, w, n: moe.grouped_dot(x, w[:, 1:], n), r"^weights: .*k = 3.*got \[2, 2, 4\]"),
        (lambda x, w, n: moe.grouped_dot(x, w, n[1:]), r"^group_sizes: .*\[2\], got int32 \[1\]"),
        (
            lambda x, w, n: moe.grouped_dot(x, w, n, gemm="mosaic"),
            "^gemm: .*got float32, k = 3, n = 4",
        ),
        (lambda x, w, n: moe.per_row(w[0, 0, 0], n, 5), r"^values: expected \[slots, …\]"),
        (
            lambda x, w, n: moe.per_row(w, n.astype(jnp.float32), 5),
            "^group_sizes: expected int32",
        ),
    ],
)
def test_bad_arguments_of_the_parts(function, words):
    with pytest.raises(ValueError, match=words):
        function(jnp.zeros((5, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("value", [None, [1], "1"])
def test_parts_take_arrays(value):
    x, w, n = jnp.zeros((5, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)
    calls = {
        "rows": lambda: moe.grouped_dot(value, w, n),
        "weights": lambda: moe.grouped_dot(x, value, n),
        "group_sizes": lambda: moe.grouped_dot(x, w, value),
        "values": lambda: moe.per_row(value, n, 5),
    }
    for name, call in calls.items():
        with pytest.raises(
            TypeError, match=f"^{name}: expected an array, .*, got {type(value).__name__}"
        ):
            call()
    for n_rows in (-1, 5.0, "5", None):
        with pytest.raises(ValueError, match=r"^n_rows: expected a static integer .*, got "):
            moe.per_row(w, n, n_rows)


def test_forward_mode_is_refused_in_words():
    x, w, n = jnp.zeros((5, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)
    for function in (
        functools.partial(moe.grouped_dot, weights=w, group_sizes=n),
        lambda x: moe.per_row(x[:2], n, 5),
    ):
        with pytest.raises(TypeError, match="expected reverse mode"):
            jax.jvp(function, (x,), (x,))


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", ["xla", "mosaic"])
def test_the_parts_on_gpus(rng, gemm):
    """Products by the kernels and sums of biases, in bfloat16: value and gradients."""
    n_rows, n_groups, k, n = 1000, 5, 128, 256
    sizes = np.array([300, 0, 129, 1, 400], np.int32)
    group, used = np.repeat(np.arange(n_groups), sizes), sizes.sum()
    rows, slope = (rng.normal(0, 1, (n_rows, size)).astype(jnp.bfloat16) for size in (k, n))
    weights = (rng.normal(0, k**-0.5, (n_groups, k, n))).astype(jnp.bfloat16)
    bias = rng.normal(0, 1, (n_groups, n)).astype(jnp.bfloat16)
    rows[used:] = slope[used:] = np.nan

    @jax.jit
    def ours(rows, weights, bias, slope):
        def linear(rows, weights, bias):
            out = moe.grouped_dot(rows, weights, jnp.asarray(sizes), gemm=gemm)
            return out + moe.per_row(bias, jnp.asarray(sizes), n_rows)

        out, pull = jax.vjp(linear, rows, weights, bias)
        return out, *pull(slope)

    out, of_rows, of_weights, of_bias = (
        np.asarray(array, np.float32) for array in ours(rows, weights, bias, slope)
    )
    wide = [array.astype(np.float32) for array in (rows[:used], weights, bias, slope[:used])]
    rows, weights, bias, slope = wide
    assert_close(
        "output", out[:used], np.einsum("mk,mkn->mn", rows, weights[group]) + bias[group], 0.02
    )
    assert_close("rows", of_rows[:used], np.einsum("mn,mkn->mk", slope, weights[group]), 0.02)
    assert not out[used:].any()
    assert not of_rows[used:].any()
    for i in range(n_groups):
        mine = group == i
        assert_close("weights", of_weights[i], rows[mine].T @ slope[mine], 0.02)
        assert_close("bias", of_bias[i], slope[mine].sum(0), 0.02)
