"""The specification itself: plain JAX, with checked shapes, and int32 arithmetic that is exact."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT32_MAX, Case
from oracles import proportional_keep

from lplb_jax import reference, topologies

sums = sys.modules["lplb_jax.reference.sums"]
assignment = sys.modules["lplb_jax.reference.assignment"]
EXTREMES = [0, 1, 0xFFFF, 0x10000, 0x1FFFF, INT32_MAX - 1, INT32_MAX]


def test_is_plain_jax():
    """No native code, since it is the oracle of the native code."""
    placement = Case(topologies.cube(), 2).placement()
    solve = jax.jit(reference.solve, static_argnames="ep_size")
    r2o = np.asarray(placement.topology)
    operands = (np.ones((1, 16), np.int32), placement.phy2log, placement.log2phy, r2o)
    assert "custom_call" not in solve.lower(*operands, ep_size=8).as_text()


@pytest.mark.skipif(
    not hasattr(reference.solve, "__wrapped__"), reason="jaxtyping or beartype is not installed"
)
def test_shapes_in_signatures_are_checked():
    """Under pytest only; see conftest.py."""
    counts = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(Exception, match=r"(?s)[Tt]ype-check.*assign"):
        reference.assign(
            jnp.zeros((2, 3), jnp.int32),  # must be flat
            counts,
            jnp.zeros(8, jnp.int32),
            jnp.zeros(8, jnp.int32),
            jnp.zeros((4, 2), jnp.int32),
            jnp.int32(0),
            ep_size=2,
            node_size=0,
            proportional=0,
            positions=0,
        )


def test_sums_are_exact_beyond_int32(rng):
    for n in (1, 2, 3, 33, 128):
        values = rng.choice([*EXTREMES, *rng.integers(0, INT32_MAX, 9)], (200, n)).astype(np.int32)
        values[::3] //= n  # so that some sums fit
        total, too_large = sums.exact_sum(jnp.asarray(values), axis=1)
        expected = [sum(row) for row in values.tolist()]
        assert too_large.tolist() == [t > INT32_MAX for t in expected]
        assert total.tolist() == [min(t, INT32_MAX) for t in expected]


def test_the_sum_at_the_limit():
    for excess in (0, 1):
        values = jnp.array([INT32_MAX - 70_000, 70_000, excess], jnp.int32)
        total, too_large = sums.exact_sum(values, axis=0)
        assert (int(total), bool(too_large)) == (INT32_MAX, bool(excess))


def test_means_are_exact_and_rounded_up(rng):
    mean = jax.jit(sums.ceil_mean)
    for n in (1, 2, 3, 33, 128):
        for _ in range(50):
            values = rng.choice([*EXTREMES, *rng.integers(0, INT32_MAX, 9)], n)
            chosen = rng.random(n) < 0.7
            values[~chosen] = 0
            expected = -(-sum(values.tolist()) // max(int(chosen.sum()), 1))
            assert int(mean(values.astype(np.int32), chosen)) == expected


def test_proportional_share_is_exact(rng):
    """Quotients of 62-bit products by long division with 32 bits."""
    share = jax.jit(assignment.proportional_share, static_argnums=4)
    load = rng.choice([*EXTREMES, *rng.integers(0, INT32_MAX, 500)], 2000)
    stay = (load * rng.choice([0, 1, *rng.random(8)], 2000)).astype(np.int64)
    count = rng.choice([*EXTREMES, *rng.integers(0, INT32_MAX, 500)], 2000)
    for ep_size in (1, 8, 1000):
        rank = int(rng.integers(ep_size))
        operands = (np.asarray(x, np.int32) for x in (count, stay, load, rank))
        got = np.asarray(share(*operands, ep_size))
        expected = [
            proportional_keep(*map(int, numbers), rank, ep_size)
            for numbers in zip(count, stay, load, strict=True)
        ]
        np.testing.assert_array_equal(got, expected)
