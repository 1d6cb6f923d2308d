"""Loads and ids that are known on the host, in any dtype that users have them in."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def array_of(name: str, values: Any, kind: str = "real numbers") -> np.ndarray:
    """`values`, maybe nested lists or on a device, in NumPy; the other arguments are for errors."""
    try:
        return np.asarray(jax.device_get(values))
    except (TypeError, ValueError) as error:  # ragged or traced
        raise TypeError(
            f"{name}: expected an array of {kind}, rows of equal length and known on the host, got "
            f"{values!r}"
        ) from error


def as_floats(array: np.ndarray) -> np.ndarray | None:
    """float64, in which sums of float16 and bfloat16 are finite; None if they are no real numbers.

    Types that JAX adds, such as bfloat16, are real numbers with a kind of their own in NumPy.
    """
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        return None
    return array.astype(np.float64)


def with_minus_one(ids: np.ndarray, n_logical: int | None) -> np.ndarray:
    """Integer ids as int64, −1 for none.

    An unsigned type's largest value means none, unless it is an id: below `n_logical`, or, if that
    is unknown, where the value below it appears as well, since experts then use the whole type.
    """
    wide = ids.astype(np.int64)
    if ids.dtype.kind != "u":
        return wide
    none = np.iinfo(ids.dtype).max
    is_id = none < n_logical if n_logical is not None else bool((ids == none - 1).any())
    return wide if is_id else np.where(ids == none, -1, wide)
