"""jit, vmap, scan, checkpoint, eval_shape and differentiation: the same results as without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, counts_of, layers, tokens
from steps import assert_same

from lplb_jax import Split, assign, count_loads, rebalance, solve, topologies

CASE = Case(topologies.cube(), 4)
N_LAYERS = 5


@pytest.fixture
def batch_of_layers(rng):
    """Tokens `[layers, ep, tokens]`, and stacked placements, one per layer."""
    ids = np.stack([tokens(rng, CASE, 60) for _ in range(N_LAYERS)])
    placements = [CASE.placement(rng) for _ in range(N_LAYERS)]
    return ids, jax.tree.map(lambda *leaves: np.stack(leaves), *placements)


def counted(ids, placement):
    return rebalance(ids, None, CASE.r2o, placement=placement)


def by_source(ids, placement):
    counts = jax.vmap(lambda row: count_loads(row, CASE.n_logical))(ids)
    return rebalance(ids, counts, CASE.r2o, placement=placement)


def by_statistics(ids, placement):
    return rebalance(ids, 7 * count_loads(ids, CASE.n_logical), CASE.r2o, placement=placement)


def with_positions(ids, placement):
    return rebalance(ids, None, CASE.r2o, placement=placement, positions=True)


ALL_MODES = [counted, by_source, by_statistics, with_positions]
MODES = pytest.mark.parametrize("balance", ALL_MODES)


def one_by_one(balance, ids, stacked):
    """Without any transformation, layer by layer."""
    results = [balance(*layer) for layer in zip(ids, layers(stacked), strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


@MODES
def test_jit(batch_of_layers, balance):
    ids, stacked = batch_of_layers
    placement = layers(stacked)[0]
    assert_same(jax.jit(balance)(ids[0], placement), balance(ids[0], placement))


@MODES
def test_vmap_over_layers(batch_of_layers, balance):
    ids, stacked = batch_of_layers
    assert_same(jax.jit(jax.vmap(balance))(ids, stacked), one_by_one(balance, ids, stacked))


@MODES
def test_vmap_over_tokens_alone(batch_of_layers, balance):
    """One placement for all: unbatched operands are broadcast."""
    ids, stacked = batch_of_layers
    placement = layers(stacked)[0]
    mapped = jax.vmap(balance, in_axes=(0, None))(ids, placement)
    same = jax.tree.map(lambda array: np.stack([array] * N_LAYERS), placement)
    assert_same(mapped, one_by_one(balance, ids, same))


def test_vmap_over_placements_alone(batch_of_layers):
    ids, stacked = batch_of_layers
    mapped = jax.vmap(counted, in_axes=(None, 0))(ids[0], stacked)
    assert_same(mapped, one_by_one(counted, [ids[0]] * N_LAYERS, stacked))


@MODES
def test_nested_vmap(batch_of_layers, balance):
    ids, stacked = batch_of_layers
    twice = np.stack([ids, ids[::-1]])
    inner = jax.vmap(balance)
    mapped = jax.jit(jax.vmap(inner, in_axes=(0, None)))(twice, stacked)
    expected = [one_by_one(balance, each, stacked) for each in twice]
    assert_same(mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


def test_vmap_of_out_axes(batch_of_layers):
    ids, stacked = batch_of_layers
    physical, _ = jax.vmap(counted, in_axes=(2, 0), out_axes=-1)(np.moveaxis(ids, 0, 2), stacked)
    assert_same(np.moveaxis(np.asarray(physical), -1, 0), one_by_one(counted, ids, stacked)[0])


@MODES
def test_scan_over_layers(batch_of_layers, balance):
    ids, stacked = batch_of_layers

    def layer(total, inputs):
        physical, split = balance(*inputs)
        return total + split.max_load, (physical, split)

    total, results = jax.jit(lambda *xs: jax.lax.scan(layer, jnp.zeros(1, jnp.int32), xs))(
        ids, stacked
    )
    expected = one_by_one(balance, ids, stacked)
    assert_same(results, expected)
    assert total == expected[1].max_load.sum()


def test_while_and_cond(batch_of_layers):
    ids, stacked = batch_of_layers
    placement = layers(stacked)[0]

    @jax.jit
    def run(ids, flag):
        def body(state):
            i, _ = state
            return i + 1, counted(jnp.roll(ids, i), placement)[0]

        last = jax.lax.while_loop(lambda state: state[0] < 3, body, (0, ids * 0))[1]
        return jax.lax.cond(flag, lambda: counted(ids, placement)[0], lambda: last)

    assert_same(run(ids[0], True), counted(ids[0], placement)[0])
    assert_same(run(ids[0], False), counted(np.roll(ids[0], 2), placement)[0])


@MODES
def test_eval_shape(batch_of_layers, balance):
    ids, stacked = batch_of_layers
    placement = layers(stacked)[0]
    shapes = jax.eval_shape(balance, ids[0], placement)
    results = balance(ids[0], placement)
    assert isinstance(shapes[1], Split)
    jax.tree.map(
        lambda shape, array: np.testing.assert_equal(
            (shape.shape, shape.dtype), (array.shape, array.dtype)
        ),
        shapes,
        results,
    )


def moe_layer(logits, tokens_in, balance):
    """A layer whose router's choice is balanced; its output does not depend on the placement."""
    weight, choice = jax.lax.top_k(jax.nn.softmax(logits), 2)
    physical, split = balance(choice)
    expert_of_slot = jnp.asarray(CASE.placement().phy2log)
    scale = 1 + jnp.arange(CASE.n_logical, dtype=jnp.float32)
    served = scale[expert_of_slot[physical]]
    return jnp.sum(weight * served * tokens_in[:, None]), (physical, split)


def balanced(choice):
    return rebalance(choice, None, CASE.r2o, placement=CASE.placement())


def given_order(choice):
    physical = jnp.asarray(CASE.placement().log2phy)[choice, 0]
    return physical, solve(count_loads(choice, CASE.n_logical), CASE.r2o)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_inside_a_differentiated_function(rng, checkpointed, jitted):
    logits = rng.normal(0, 1, (50, CASE.n_logical)).astype(np.float32)
    x = rng.normal(0, 1, 50).astype(np.float32)
    layer = functools.partial(moe_layer, balance=balanced)
    layer = jax.checkpoint(layer) if checkpointed else layer
    gradient = jax.value_and_grad(layer, argnums=(0, 1), has_aux=True)
    gradient = jax.jit(gradient) if jitted else gradient
    (value, (physical, split)), slopes = gradient(logits, x)

    plain = functools.partial(moe_layer, balance=given_order)
    (expected, _), expected_slopes = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(
        logits, x
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for slope, want in zip(slopes, expected_slopes, strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-6)
    _, choice = jax.lax.top_k(jax.nn.softmax(logits), 2)
    assert_same((physical, split), balanced(choice))


def test_jvp_and_scan_of_a_differentiated_function(rng):
    logits = rng.normal(0, 1, (3, 20, CASE.n_logical)).astype(np.float32)
    x = rng.normal(0, 1, 20).astype(np.float32)

    def model(logits, balance):
        def layer(carry, logits):
            return carry + moe_layer(logits, x, balance)[0], None

        return jax.lax.scan(jax.checkpoint(layer), 0.0, logits)[0]

    direction = rng.normal(0, 1, logits.shape).astype(np.float32)
    for balance in (balanced, given_order):
        loss = functools.partial(model, balance=balance)
        value, slope = jax.jvp(loss, (logits,), (direction,))
        gradient = jax.jit(jax.grad(loss))(logits)
        np.testing.assert_allclose(slope, (gradient * direction).sum(), rtol=1e-3, atol=1e-4)
        assert np.isfinite(value)


def test_vmap_of_grad(rng):
    logits = rng.normal(0, 1, (3, 20, CASE.n_logical)).astype(np.float32)
    x = rng.normal(0, 1, 20).astype(np.float32)

    def slope(balance):
        return jax.vmap(jax.grad(lambda logits: moe_layer(logits, x, balance)[0]))(logits)

    np.testing.assert_allclose(slope(balanced), slope(given_order), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_split_has_no_derivative(rng, jitted):
    """Trained weights may predict the loads: the message says how to stop the gradient."""
    loads = rng.uniform(1, 9, CASE.n_logical).astype(np.float32)

    def busiest(loads):
        return solve(loads, CASE.r2o).max_load.sum()

    slope = jax.grad(jax.jit(busiest) if jitted else busiest)
    with pytest.raises(ValueError, match=r"no derivative; apply jax\.lax\.stop_gradient"):
        slope(loads)
    stopped = jax.grad(lambda loads: busiest(jax.lax.stop_gradient(loads)) + loads.sum())
    np.testing.assert_array_equal(stopped(loads), np.ones_like(loads))


@MODES
def test_a_new_placement_needs_no_new_compilation(batch_of_layers, balance):
    ids, stacked = batch_of_layers
    traces = []

    @jax.jit
    def run(ids, placement):
        traces.append(1)
        return balance(ids, placement)

    results = [run(*layer) for layer in zip(ids, layers(stacked), strict=True)]
    assert len(traces) == 1
    expected = one_by_one(balance, ids, stacked)
    assert_same(jax.tree.map(lambda *leaves: np.stack(leaves), *results), expected)


def test_steps_under_jit(rng):
    ids = tokens(rng, CASE, 50)
    loads = counts_of(ids, CASE.n_logical)
    count = jax.jit(count_loads, static_argnums=1)
    assert_same(count(ids, CASE.n_logical), loads.sum(axis=0, dtype=np.int32))
    split = jax.jit(lambda loads: solve(loads, CASE.r2o))(loads)
    assert_same(split, solve(loads, CASE.r2o))
    place = jax.jit(lambda ids, loads, split: assign(ids, loads, split, CASE.r2o))
    assert_same(place(ids, loads, split), assign(ids, loads, split, CASE.r2o))


@pytest.mark.filterwarnings("error")
def test_x64_changes_nothing(rng):
    """No int64 creeps into shapes or results, and the jitted code is the same."""
    ids = tokens(rng, CASE, 50)
    placement = CASE.placement(rng)
    expected = [balance(ids, placement) for balance in (counted, by_source)]
    with jax.enable_x64(True):
        got = [jax.jit(balance)(ids, placement) for balance in (counted, by_source)]
    assert_same(got, expected)


def test_lowering_is_repeatable(rng):
    """The same program text twice: compilation caches hit."""
    ids = tokens(rng, CASE, 50)

    def text():
        return jax.jit(lambda ids: counted(ids, CASE.placement())).lower(ids).as_text()

    assert text() == text()
