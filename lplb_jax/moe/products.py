"""Grouped GEMMs: the rows of every slot times the slot's weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lplb_jax._axes import varying_as
from lplb_jax._problem import check_array, check_count
from lplb_jax.moe.copies import check_reverse, custom_vjp, numbers, wider

Gemm = Literal["auto", "xla", "mosaic"]
GEMMS = get_args(Gemm)
# Results of `grouped_dot`: worth keeping rather than recomputing in a backward pass.
PRODUCT = "lplb_product"
_BLOCK_K = 64  # rows or columns that a kernel multiplies at a time
_TILE = 128  # rows that XLA multiplies at a time; sizes of kernels' matrices are multiples of it


def grouped_dot(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, gemm: Gemm = "auto"
) -> jax.Array:
    """Multiplies the rows of every slot by the slot's matrix: a building block for your own `ffn`.

    Args:
      rows: floats `[n_rows, k]`, slot by slot. Rows past the last group are ignored.
      weights: `[slots, k, n]`, of `rows`' dtype, or of a narrower or an integer dtype, which is
        converted first: multiply the result by its scales, see `per_row`. Integers take no
        gradient.
      group_sizes: int32 `[slots]`, consecutive rows of every slot; their sum is at most n_rows.
      gemm: the kernels, see `expert_ffn`; for "mosaic", k and n must be multiples of 128.

    Returns:
      `[n_rows, n]` of `rows`' dtype; 0 past the last group, as are the gradients of rows there. NaN
      and infinities stay within the rows of their slot.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> rows, weights = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[[10.0]], [[100.0]]])
    >>> moe.grouped_dot(rows, weights, jnp.array([1, 1])).tolist()
    [[10.0], [200.0], [0.0]]
    """
    check_rows("rows", rows)
    check_array("weights", weights, "[slots, k, n]")
    if weights.ndim != 3 or weights.shape[1] != rows.shape[1]:
        raise ValueError(
            f"weights: expected [slots, k, n] with k = {rows.shape[1]} as rows have, got "
            f"{list(weights.shape)}"
        )
    check_group_sizes(group_sizes, len(weights))
    check_reverse("rows", (rows, weights))
    rows, weights, group_sizes = map(jnp.asarray, (rows, weights, group_sizes))
    products = choose(gemm, rows.dtype, k=weights.shape[1], n=weights.shape[2])
    weights, group_sizes = varying_as((weights.astype(rows.dtype), group_sizes), rows)
    return zero_past_the_end(_dot(products, rows, weights, group_sizes), group_sizes)


@custom_vjp(0)
def _dot(
    products: Products, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    return _dot_forward(products, rows, weights, group_sizes)[0]


def _dot_forward(
    products: Products, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows = products.cleaned(rows, group_sizes)
    out = checkpoint_name(products.of_rows(rows, weights, group_sizes), PRODUCT)
    return out, (rows, weights, group_sizes)


def _dot_backward(
    products: Products, saved: tuple[jax.Array, ...], ct: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = saved
    ct = products.cleaned(ct, group_sizes)
    of_rows = products.of_rows(ct, weights, group_sizes, transposed=True)
    of_weights = products.of_weights(rows, ct, group_sizes)
    return zero_past_the_end(of_rows, group_sizes), of_weights, None


_dot.defvjp(_dot_forward, _dot_backward)


def per_row(values: jax.Array, group_sizes: jax.Array, n_rows: int) -> jax.Array:
    """Repeats a slot's values, such as biases or scales, for each of its rows.

    Args:
      values: `[slots, …]`.
      group_sizes: int32 `[slots]`, consecutive rows of every slot; their sum is at most n_rows.
      n_rows: rows of the result, including rows past the last group.

    Returns:
      `[n_rows, …]`; 0 past the last group. Gradients of floats are summed in float32.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> moe.per_row(jnp.array([7, 8, 9]), jnp.array([2, 0, 1]), 4).tolist()
    [7, 7, 9, 0]
    """
    check_array("values", values, "[slots, …]")
    if not jax.export.is_symbolic_dim(n_rows):
        n_rows = check_count("n_rows", n_rows, least=0)
    if values.ndim < 1:
        raise ValueError(f"values: expected [slots, …], got {list(values.shape)}")
    check_group_sizes(group_sizes, len(values))
    check_reverse("values", values)
    values, group_sizes = map(jnp.asarray, (values, group_sizes))
    return _per_row(n_rows, varying_as(values, group_sizes), varying_as(group_sizes, values))


@custom_vjp(0)
def _per_row(n_rows: int, values: jax.Array, group_sizes: jax.Array) -> jax.Array:
    # Rows past the last group have no slot.
    return values.at[_slot_of_row(n_rows, group_sizes)].get(mode="fill", fill_value=0)


def _slot_of_row(n_rows: int, group_sizes: jax.Array) -> jax.Array:
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return (numbers(n_rows)[:, None] >= ends[None]).sum(axis=1, dtype=jnp.int32)


def _per_row_backward(n_rows: int, group_sizes: jax.Array, ct: jax.Array) -> tuple[jax.Array, None]:
    columns = ct.reshape(n_rows, math.prod(ct.shape[1:]))
    if choose("auto", ct.dtype, k=_TILE, n=columns.shape[1]) is MOSAIC:
        # A scatter would add all rows of a slot to the same place, one after the other.
        ones = varying_as(jnp.ones((n_rows, _TILE), ct.dtype), ct)
        columns = MOSAIC.cleaned(columns, group_sizes)
        sums = MOSAIC.of_weights(ones, columns, group_sizes)[:, 0]
    else:
        empty = jnp.zeros((len(group_sizes), columns.shape[1]), wider(ct.dtype, jnp.float32))
        slot = _slot_of_row(n_rows, group_sizes)
        sums = varying_as(empty, ct).at[slot].add(columns.astype(empty.dtype), mode="drop")
    return sums.astype(ct.dtype).reshape(len(group_sizes), *ct.shape[1:]), None


_per_row.defvjp(
    lambda n_rows, values, group_sizes: (_per_row(n_rows, values, group_sizes), group_sizes),
    _per_row_backward,
)


def check_rows(name: str, rows: jax.Array) -> None:
    """Raises unless `rows` are floats `[n_rows, columns]`."""
    check_array(name, rows, "floats [n_rows, hidden]")
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected floats [n_rows, hidden], got {rows.dtype} {list(rows.shape)}"
        )


def check_group_sizes(group_sizes: jax.Array, slots: int) -> None:
    """Raises unless `group_sizes` is int32 `[slots]`."""
    check_array("group_sizes", group_sizes, "int32 [slots]")
    if group_sizes.shape != (slots,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes: expected int32 [slots] = [{slots}], got {group_sizes.dtype} "
            f"{list(group_sizes.shape)}"
        )


def choose(gemm: str, dtype: Any, **sizes: int) -> Products:
    """Chooses the kernels for matrices of these sizes; raises if `gemm` does not support them."""
    if gemm not in GEMMS:
        raise ValueError(f"gemm: expected one of {', '.join(GEMMS)}, got {gemm!r}")
    if gemm == "xla":
        return XLA
    fits = dtype in (jnp.bfloat16, jnp.float16) and all(n % _TILE == 0 for n in sizes.values())
    if gemm == "mosaic" and not fits:
        got = ", ".join(f"{name} = {n}" for name, n in sizes.items())
        raise ValueError(
            f"gemm: expected bfloat16 or float16 and multiples of 128 for 'mosaic', got "
            f"{dtype}, {got}; use gemm='xla'"
        )
    return MOSAIC if gemm == "mosaic" or (fits and _has_wgmma()) else XLA


def _has_wgmma() -> bool:
    """Whether the GPU has wgmma, which the kernels use and only Hopper has."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and capability.split(".")[0] == "9"


class Products(NamedTuple):
    """A set of grouped GEMM kernels.

    Attributes:
      of_rows: rows `[m, k]`, weights `[g, k, n]` (or `transposed`: `[g, n, k]`), sizes -> `[m, n]`.
      of_weights: rows `[m, k]`, cotangents `[m, n]`, sizes -> `[g, k, n]`.
      cleaned: rows `[m, k]`, sizes -> the same, with harmless values past the last group.
    """

    of_rows: Callable[..., jax.Array]
    of_weights: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    cleaned: Callable[[jax.Array, jax.Array], jax.Array]


# Why not lax.ragged_dot: on CPUs and GPUs, XLA lowers it to one dense product in which zeros stand
# for the rows of other groups. Zero times NaN is NaN, so one diverged expert would reach all
# tokens; and the work is multiplied by the number of groups.


class _Tiles(NamedTuple):
    """Products of a block of rows with the weights of one group, int32 `[n_tiles]` each.

    Attributes:
      group: the group.
      block: the first row of the block.
      first: the first row of the group in the block.
      end: one past the last row of the group; at most `first` for empty tiles.
    """

    group: jax.Array
    block: jax.Array
    first: jax.Array
    end: jax.Array


def _tiles(group_sizes: jax.Array, n_rows: int, length: int) -> _Tiles:
    """The most tiles possible: consecutive groups share at most one block."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    of_group = jnp.where(group_sizes > 0, -(-ends // length) - starts // length, 0)
    last = jnp.cumsum(of_group, dtype=jnp.int32)
    tile = numbers(-(-n_rows // length) + len(group_sizes) - 1)
    group = jnp.minimum((tile[:, None] >= last[None]).sum(1, dtype=jnp.int32), len(last) - 1)
    block = (starts // length)[group] + tile - (last - of_group)[group]
    first = jnp.maximum(starts[group], block * length)
    end = jnp.minimum(ends[group], (block + 1) * length)
    return _Tiles(group, jnp.minimum(block * length, n_rows - length), first, end)


def _over_tiles(
    step: Callable[..., jax.Array], out: jax.Array, group_sizes: jax.Array, n_rows: int
) -> jax.Array:
    """Runs `step(out, tile, length, mine)` for every tile; `mine` masks the tile's group."""
    length = min(_TILE, n_rows)
    tiles = _tiles(group_sizes, n_rows, length)

    def one(out: jax.Array, tile: _Tiles) -> tuple[jax.Array, None]:
        row = tile.block + numbers(length)
        return step(out, tile, length, ((row >= tile.first) & (row < tile.end))[:, None]), None

    return lax.scan(one, varying_as(out, group_sizes), tiles)[0]


def _xla_of_rows(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transposed: bool = False
) -> jax.Array:
    def step(out: jax.Array, tile: _Tiles, length: int, mine: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(rows, tile.block, length)
        columns = (((1,), (1 if transposed else 0,)), ((), ()))
        of_group = lax.dynamic_index_in_dim(weights, tile.group, keepdims=False)
        product = lax.dot_general(block, of_group, columns)
        others = lax.dynamic_slice_in_dim(out, tile.block, length)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine, product, others), tile.block, axis=0
        )

    out = jnp.zeros((len(rows), weights.shape[1 if transposed else 2]), rows.dtype)
    return _over_tiles(step, out, group_sizes, len(rows))


def _xla_of_weights(rows: jax.Array, ct: jax.Array, group_sizes: jax.Array) -> jax.Array:
    wide = wider(rows.dtype, jnp.float32)

    def step(out: jax.Array, tile: _Tiles, length: int, mine: jax.Array) -> jax.Array:
        of_rows, of_ct = (
            jnp.where(mine, lax.dynamic_slice_in_dim(array, tile.block, length), 0)
            for array in (rows, ct)
        )
        by_rows = (((0,), (0,)), ((), ()))
        product = lax.dot_general(of_rows, of_ct, by_rows, preferred_element_type=wide)
        return out.at[tile.group].add(product)

    out = jnp.zeros((len(group_sizes), rows.shape[1], ct.shape[1]), wide)
    return _over_tiles(step, out, group_sizes, len(rows)).astype(rows.dtype)


def _unchanged(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Nothing to clean: no tile has rows past the last group."""
    del group_sizes
    return rows


def zero_past_the_end(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    inside = numbers(len(rows)) < group_sizes.sum(dtype=jnp.int32)
    return jnp.where(inside[:, None], rows, 0)


def _zero_in_last_block(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Kernels read whole blocks, but no block that starts past the last group."""
    n_block = min(_BLOCK_K, len(rows))
    n = group_sizes.sum(dtype=jnp.int32)
    start = jnp.minimum(n, len(rows) - n_block)
    block = lax.dynamic_slice_in_dim(rows, start, n_block)
    block = zero_past_the_end(block, (n - start)[None])
    return lax.dynamic_update_slice_in_dim(rows, block, start, axis=0)


# Block sizes: within 2 % of the fastest tried at both of a layer's shapes, on an H200 with 3,277
# rows per expert; wider blocks spill registers and are five times slower.
def _mosaic_of_rows(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transposed: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    n = weights.shape[1 if transposed else 2]
    out = ragged_dot(
        rows,
        weights,
        group_sizes=group_sizes,
        block_m=192,
        block_n=128,
        block_k=_BLOCK_K,
        max_concurrent_steps=4,
        grid_block_n=_neighbours(n),
        transpose_rhs=transposed,
    )
    # The kernels do not declare that their results vary over ranks.
    return varying_as(out, rows)


def _mosaic_of_weights(rows: jax.Array, ct: jax.Array, group_sizes: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    out = transposed_ragged_dot(
        rows,
        ct,
        group_sizes=group_sizes,
        block_m=128,
        block_n=128,
        block_k=_BLOCK_K,
        max_concurrent_steps=4,
        grid_block_n=_neighbours(ct.shape[1]),
    )
    return varying_as(out, rows)


@functools.cache
def _neighbours(n: int) -> int:
    """Blocks of columns that are computed together, so that they share rows in the cache."""
    return next(size for size in (8, 4, 2, 1) if n // 128 % size == 0)


XLA = Products(_xla_of_rows, _xla_of_weights, _unchanged)
MOSAIC = Products(_mosaic_of_rows, _mosaic_of_weights, _zero_in_last_block)
