"""Mapped axes: their names and sizes, and the types of values that vary along them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any

import jax
from jax import lax


def check_axis(axis_name: Any) -> int:
    """Size of a mapped axis in scope, or the product over several."""
    check_axis_names("axis_name", axis_name)
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name: expected an axis of an enclosing jax.shard_map, got {axis_name!r}, which "
            f"is not in scope here"
        ) from None


def axis_names(axis_name: Any) -> tuple[Any, ...]:
    """One mapped axis or several, as a tuple."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def check_axis_names(argument: str, axis_name: Any) -> tuple[Any, ...]:
    """`axis_names`; raises unless they are distinct names of axes."""
    names = axis_names(axis_name)
    # JAX treats an integer as a dimension of the array, and not every collective takes a list.
    named = all(isinstance(name, Hashable) and not isinstance(name, int) for name in names)
    if not named or not names or len(set(names)) < len(names):
        raise ValueError(
            f"{argument}: expected a mesh axis's name or a tuple of different names, got "
            f"{axis_name!r}"
        )
    return names


def varies_over(array: Any, axis_name: Any) -> bool:
    """Whether JAX knows that `array` may differ along this mapped axis (or one of a tuple)."""
    return any(name in jax.typeof(array).manual_axis_type.varying for name in axis_names(axis_name))


def axes_of_size(array: Any, size: int) -> tuple[Any, ...] | None:
    """The fewest mapped axes along which `array` varies over `size` ranks; None if there are none.

    `jax.shard_map(check_vma=False)` does not tell along which axes arrays vary.
    """
    varying = sorted(jax.typeof(array).manual_axis_type.varying)
    for n in range(1, len(varying) + 1):
        for names in itertools.combinations(varying, n):
            if lax.axis_size(names) == size:
                return names
    return None


def varying_over(array: jax.Array, axis_name: Any) -> jax.Array:
    """`array` typed as varying along this mapped axis (or a tuple of axes)."""
    varying = jax.typeof(array).manual_axis_type.varying
    missing = tuple(axis for axis in axis_names(axis_name) if axis not in varying)
    return lax.pcast(array, missing, to="varying") if missing else array


def varying_as(tree: Any, array: jax.Array) -> Any:
    """`tree` with leaves typed as varying along all axes that `array` varies along."""
    axes = tuple(sorted(jax.typeof(array).manual_axis_type.varying))
    return jax.tree.map(lambda leaf: varying_over(leaf, axes), tree)
