"""Sums of int32 that may exceed 2³¹, without 64 bits: two limbs of 16 bits each."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int32

INT32_MAX = np.int32(2**31 - 1)


def exact_sum(
    values: Int32[Array, "..."], axis: int
) -> tuple[Int32[Array, "..."], Bool[Array, "..."]]:
    """The sum of values ≥ 0, capped at 2³¹ − 1, and whether it was capped."""
    high = (values >> 16).sum(axis=axis, dtype=jnp.int32)
    low = (values & 0xFFFF).sum(axis=axis, dtype=jnp.int32)
    too_large = high + (low >> 16) >= 1 << 15
    return jnp.where(too_large, INT32_MAX, values.sum(axis=axis, dtype=jnp.int32)), too_large


def capped_add(a: Int32[Array, "..."], b: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """a + b for values ≥ 0, capped at 2³¹ − 1."""
    return a + jnp.minimum(b, INT32_MAX - a)


def ceil_divide(values: Int32[Array, "*n"], divisor: int) -> Int32[Array, "*n"]:
    """⌈values / divisor⌉ for values ≥ 0."""
    return values // divisor + (values % divisor > 0)


def ceil_mean(values: Int32[Array, " n"], chosen: Bool[Array, " n"]) -> Int32[Array, ""]:
    """⌈sum of values / number chosen⌉ for values ≥ 0 that are 0 if not chosen."""
    n = jnp.maximum(chosen.sum(dtype=jnp.int32), 1)
    high = (values >> 16).sum(dtype=jnp.int32)
    low = (values & 0xFFFF).sum(dtype=jnp.int32)
    return ((high // n) << 16) + ((high % n << 16) + low + n - 1) // n
