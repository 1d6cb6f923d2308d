"""Copying rows and summing copies, which are each other's transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from lplb_jax._axes import varying_as


def custom_vjp(*nondiff_argnums: int) -> Callable[[Callable[..., Any]], Any]:
    """`jax.custom_vjp` as a decorator with arguments; type checkers see `Any`."""
    return lambda function: jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)


class Copies(NamedTuple):
    """A list of copies of another list's entries; an entry may have several.

    Attributes:
      entry: int32 `[copies]`, the entry that each copies; arbitrary for places without a copy.
      places: int32 `[entries, most]`, places of an entry's copies; the list's length for none.
    """

    entry: jax.Array
    places: jax.Array


def choice_at(places: jax.Array, n: int) -> jax.Array:
    """int32 `[n]`: the index in flattened `places` of each of 0 … n − 1; 0 if absent."""
    empty = varying_as(jnp.zeros(n, jnp.int32), places)
    choices = numbers(places.size)
    return empty.at[places.reshape(-1)].set(choices, mode="drop", unique_indices=True)


@jax.custom_vjp
def copy(entries: jax.Array, copies: Copies) -> jax.Array:
    """`[entries, …]` -> `[copies, …]`. Places without a copy are undefined, possibly NaN."""
    if jax.default_backend() == "gpu" and _is_wide(entries):
        return scattered(entries, copies)
    return entries[copies.entry]


@jax.custom_vjp
def add(array: jax.Array, copies: Copies) -> jax.Array:
    """`[copies, …]` -> `[entries, …]`: sums the copies of each entry in float32."""
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
    """`rows`, but only the first n take gradients; the others' are 0 even for NaN cotangents."""
    del n
    return rows


head.defvjp(
    lambda rows, n: (rows, n),
    lambda n, ct: (jnp.where((numbers(len(ct)) < n)[:, None], ct, 0), None),
)


def check_reverse(name: str, tree: Any) -> None:
    """Raises under `jax.jvp`, since only reverse-mode derivatives exist here.

    Inside `jax.jit`, JAX itself raises.
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
    """The dtype to compute in for two float dtypes, also under strict dtype promotion."""
    # JAX never promotes floats of 8 bits or fewer implicitly, not even by its standard rules.
    a, b = (jnp.bfloat16 if jnp.finfo(dtype).bits <= 8 else dtype for dtype in (a, b))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _is_wide(entries: jax.Array) -> bool:
    """Whether rows are wide enough: if a cache line holds several rows, a gather is as fast.

    Triton indexes up to 4 GiB with signed 32 bits, which rules out one-byte types.
    """
    rows = entries.ndim == 2 and len(entries) > 0
    return rows and entries.shape[1] % 128 == 0 and entries.dtype.itemsize > 1


def scattered(entries: jax.Array, copies: Copies, *, interpret: bool = False) -> jax.Array:
    """`copy` by a kernel that reads every entry once and writes it to all its places.

    A gather reads an entry once per place, from memory if the list exceeds the cache: on an H200,
    four copies each of 32,768 rows of 4 KiB take 375 µs by XLA's gather and 200 µs here.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (n_entries, columns), most, n = entries.shape, copies.places.shape[1], len(copies.entry)
    block = min(columns & -columns, 4096)  # a power of two, as Triton requires

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
    """Adds received rows to rows of `total`: in float32, one by one, and rounded once.

    Row i gets `received[places[i, k]]` for every k; indices past the end add nothing. `places` is
    int32 `[rows, most]` and may have fewer rows than `total`. No received row is added twice.
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
    """`add_received` by a kernel that reads and writes only the rows `targets` of `total`.

    Only the device knows how many there are. In an XLA loop, absent rows would cost as much as
    present ones.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    n, columns = total.shape
    n_received, (n_targets, most) = len(received), places.shape
    block = min(columns & -columns, 4096)  # a power of two, as Triton requires

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
