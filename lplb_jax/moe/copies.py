"""Copies of rows, and sums of copies: each other's transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from lplb_jax._axes import varying_as


def custom_vjp(*nondiff_argnums: int) -> Callable[[Callable[..., Any]], Any]:
    """`jax.custom_vjp` as a decorator with arguments, of what type checkers take for anything."""
    return lambda function: jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)


class Copies(NamedTuple):
    """A list that holds entries of another, some of them several times.

    Attributes:
      entry: int32 `[copies]`, of which entry each is a copy; of any, where it is of none.
      places: int32 `[entries, most]`, where the copies of an entry are; the list's length for none.
    """

    entry: jax.Array
    places: jax.Array


def choice_at(places: jax.Array, n: int) -> jax.Array:
    """int32 `[n]`: which of `places`, numbered row by row, is each of 0 … n − 1; 0 if none is."""
    empty = varying_as(jnp.zeros(n, jnp.int32), places)
    choices = numbers(places.size)
    return empty.at[places.reshape(-1)].set(choices, mode="drop", unique_indices=True)


@jax.custom_vjp
def copy(entries: jax.Array, copies: Copies) -> jax.Array:
    """`[entries, …]` -> `[copies, …]`. What is a copy of no entry may be anything, also NaN."""
    if jax.default_backend() == "gpu" and _is_wide(entries):
        return scattered(entries, copies)
    return entries[copies.entry]


@jax.custom_vjp
def add(array: jax.Array, copies: Copies) -> jax.Array:
    """`[copies, …]` -> `[entries, …]`: the sums of their copies, in float32."""
    picked = array.at[copies.places].get(mode="fill", fill_value=0)
    return picked.astype(wider(array.dtype, jnp.float32)).sum(axis=1).astype(array.dtype)


copy.defvjp(
    lambda entries, copies: (copy(entries, copies), copies),
    lambda copies, ct: (add(ct, copies), None),
)
add.defvjp(
    lambda array, copies: (add(array, copies), copies),
    lambda copies, ct: (copy(ct, copies), None),
)


@jax.custom_vjp
def head(rows: jax.Array, n: jax.Array) -> jax.Array:
    """`rows`, of which the first n take gradients; the others' are 0 whatever comes, also NaN."""
    del n
    return rows


head.defvjp(
    lambda rows, n: (rows, n),
    lambda n, ct: (jnp.where((numbers(len(ct)) < n)[:, None], ct, 0), None),
)


def check_reverse(name: str, tree: Any) -> None:
    """Raises under `jax.jvp`: the derivatives here are transposes, written for reverse mode.

    Inside `jax.jit` JAX itself says so.
    """
    if any(isinstance(leaf, ad.JVPTracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{name}: expected reverse mode (jax.grad, jax.vjp), for which the derivatives in "
            f"lplb_jax.moe are written, got forward mode (jax.jvp)"
        )


def numbers(n: int) -> jax.Array:
    """int32 0 … n − 1, whether or not `jax_enable_x64` is set."""
    return jnp.arange(n, dtype=jnp.int32)


def wider(a: Any, b: Any) -> Any:
    """The type to compute in with two types of floats, also where JAX shall not choose it."""
    # Those of 8 bits and less are promoted to nothing, not even by JAX's standard rules.
    a, b = (jnp.bfloat16 if jnp.finfo(dtype).bits <= 8 else dtype for dtype in (a, b))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _is_wide(entries: jax.Array) -> bool:
    """Of short rows, a line of the cache holds several, and a gather is as fast.

    Triton counts the elements of less than 4 GiB in 32 bits with a sign, so none of one byte.
    """
    rows = entries.ndim == 2 and len(entries) > 0
    return rows and entries.shape[1] % 128 == 0 and entries.dtype.itemsize > 1


def scattered(entries: jax.Array, copies: Copies, *, interpret: bool = False) -> jax.Array:
    """`copy` by a kernel that reads every entry once and writes it to all its places.

    A gather reads it for each place, again from memory where the list is longer than the cache:
    on an H200, four copies each of 32,768 rows of 4 KiB take 375 µs by XLA's gather, and 200 here.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (n_entries, columns), most, n = entries.shape, copies.places.shape[1], len(copies.entry)
    block = min(columns & -columns, 4096)  # a power of two, as Triton wants it

    def kernel(places: Any, entry: Any, out: Any) -> None:
        row = entry[0, :]
        for k in range(most):
            place = places[0, k]
            there = jnp.broadcast_to(place < n, row.shape)
            triton.store(out.at[jnp.minimum(place, n - 1), :], row, mask=there)

    return pl.pallas_call(
        kernel,
        name="scatter_copies",
        grid=(n_entries, columns // block),
        in_specs=[
            pl.BlockSpec((1, most), lambda i, j: (i, 0)),
            pl.BlockSpec((1, block), lambda i, j: (i, j)),
        ],
        out_specs=pl.BlockSpec((n, block), lambda i, j: (0, j)),
        out_shape=jax.ShapeDtypeStruct(
            (n, columns), entries.dtype, manual_axis_type=jax.typeof(entries).manual_axis_type
        ),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(varying_as(copies.places, entries), entries)


def add_received(total: jax.Array, received: jax.Array, places: jax.Array) -> jax.Array:
    """`total`, to some rows of which others are added: in float32, one by one, and rounded once.

    To row i, `received[places[i, k]]` for every k, none where that is past the end; int32
    `[rows, most]`, of which there may be fewer rows than of `total`. No row is received twice.
    """
    n_rows, most = places.shape
    n_targets = min(n_rows, len(received))
    if n_targets == 0 or most == 0:
        return total
    some = (places < len(received)).any(axis=1)
    at = jnp.where(some, jnp.cumsum(some, dtype=jnp.int32) - 1, n_targets)
    targets = varying_as(jnp.full(n_targets, len(total), jnp.int32), at)
    targets = targets.at[at].set(numbers(n_rows), mode="drop")
    places = places.at[targets].get(mode="fill", fill_value=len(received))
    wide = wider(total.dtype, jnp.float32)
    of_kernel = _is_wide(_flat(total)) and total.size < 2**31 and wide == jnp.float32
    if jax.default_backend() == "gpu" and of_kernel:
        return added_in_place(_flat(total), _flat(received), targets, places).reshape(total.shape)

    def one(total: jax.Array, places: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        target, row = places[0], total.at[places[0]].get(mode="clip").astype(wide)
        for k in range(most):
            row += received.at[places[1][k]].get(mode="fill", fill_value=0).astype(wide)
        return total.at[target].set(row.astype(total.dtype), mode="drop"), None

    return lax.scan(one, varying_as(total, received), (targets, places))[0]


def added_in_place(
    total: jax.Array,
    received: jax.Array,
    targets: jax.Array,
    places: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`add_received` by a kernel, for the rows `targets` of `total`; it reads and writes no others.

    How many there are is known on the device alone. In a loop of XLA's they would all cost the
    same, there or not.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    n, columns = total.shape
    n_received, (n_targets, most) = len(received), places.shape
    block = min(columns & -columns, 4096)  # a power of two, as Triton wants it

    def kernel(targets: Any, places: Any, received: Any, total: Any, out: Any) -> None:
        target = targets[0]
        here, of_target = jnp.broadcast_to(target < n, (block,)), jnp.minimum(target, n - 1)
        row = triton.load(total.at[of_target, :], mask=here, other=0.0).astype(jnp.float32)
        for k in range(most):
            place = places[0, k]
            there = jnp.broadcast_to(place < n_received, (block,))
            place = jnp.minimum(place, n_received - 1)
            row += triton.load(received.at[place, :], mask=there, other=0.0).astype(jnp.float32)
        triton.store(out.at[of_target, :], row.astype(out.dtype), mask=here)

    def columns_of(rows: int) -> Any:
        return pl.BlockSpec((rows, block), lambda i, j: (0, j))

    return pl.pallas_call(
        kernel,
        name="add_received",
        grid=(n_targets, columns // block),
        in_specs=[
            pl.BlockSpec((1,), lambda i, j: (i,)),
            pl.BlockSpec((1, most), lambda i, j: (i, 0)),
            columns_of(n_received),
            columns_of(n),
        ],
        out_specs=columns_of(n),
        out_shape=jax.ShapeDtypeStruct(
            total.shape, total.dtype, manual_axis_type=jax.typeof(total).manual_axis_type
        ),
        input_output_aliases={3: 0},
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(varying_as(targets, total), varying_as(places, total), received, total)


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(len(rows), -1)
