"""count_loads: every index type, every kind of id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import assert_same, native_count, spec_count

from lplb_jax import count_loads

ABSENT = {"int32": -1, "int64": -1, "uint8": 255, "uint16": 65535}
# For uint8 also fewer, equally many and more experts than it has values.
SIZES = [
    *(("uint8", n) for n in (1, 8, 200, 255, 256, 300)),
    *(("uint16", n) for n in (1, 256, 1024)),
    *(("int32", n) for n in (1, 3, 256, 1000)),
    *(("int64", n) for n in (7, 256)),
]


def random_ids(rng, dtype, n_logical, shape):
    """Mostly experts, some absent, some invalid ids of all magnitudes."""
    info = np.iinfo(dtype)
    ids = rng.integers(0, min(n_logical, info.max + 1), shape)
    wild = rng.integers(info.min, info.max, shape, endpoint=True, dtype=dtype)
    near = rng.integers(-3, 4, shape) + n_logical
    kind = rng.integers(0, 10, shape)
    ids = np.where(kind == 0, ABSENT[dtype], ids)
    ids = np.where(kind == 1, wild, ids)
    ids = np.where(kind == 2, near.clip(info.min, info.max), ids)
    return ids.astype(dtype)


def count_in_python(ids, n_logical):
    """Counts, followed by the number of ids that are neither an expert nor absent."""
    counts = [0] * (n_logical + 1)
    absent = ABSENT[ids.dtype.name]
    for value in ids.ravel().tolist():
        if 0 <= value < n_logical:
            counts[value] += 1
        elif value != absent:
            counts[n_logical] += 1
    return counts


@pytest.mark.parametrize(("dtype", "n_logical"), SIZES)
def test_counts(rng, dtype, n_logical):
    with jax.enable_x64(dtype == "int64"):
        ids = random_ids(rng, dtype, n_logical, (3, 7, 41))
        expected = count_in_python(ids, n_logical)
        counts = count_loads(ids, n_logical)
        assert counts.dtype == np.int32
        np.testing.assert_array_equal(counts, expected[:-1])
        full = native_count(ids.ravel(), n_logical)
        np.testing.assert_array_equal(full, expected)
        assert_same(full, spec_count(ids.ravel(), n_logical))


def test_the_largest_uint8_is_an_expert_where_there_are_256():
    ids = np.array([255, 255, 0], np.uint8)
    assert count_loads(ids, 256)[255] == 2
    assert count_loads(ids, 255).sum() == 1


@pytest.mark.parametrize("shape", [(0,), (4, 0, 2), (), (1,), (2, 3, 5)])
def test_any_shape(rng, shape):
    ids = rng.integers(0, 5, shape).astype(np.int32)
    np.testing.assert_array_equal(count_loads(ids, 5), np.bincount(ids.ravel(), minlength=5))


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 31, 32, 33, 4099])
def test_lengths_around_blocks(rng, n_tokens):
    ids = rng.integers(-1, 9, n_tokens).astype(np.int32)
    np.testing.assert_array_equal(native_count(ids, 8), count_in_python(ids, 8))


def test_everything_on_one_expert():
    ids = jnp.full(100_000, 7, jnp.int32)
    np.testing.assert_array_equal(count_loads(ids, 8), [0] * 7 + [100_000])


@pytest.mark.parametrize("value", [2**32 + 1, 2**31, -(2**32) + 1, 2**40])
def test_wide_ids_do_not_wrap_around(value):
    """Without x64, JAX would truncate int64 ids to other, valid ones."""
    assert count_loads(np.array([value, 0, -1]), 4).tolist() == [1, 0, 0, 0]
    assert count_loads([value, 0, -1], 4).tolist() == [1, 0, 0, 0]
