"""The experts' feed-forward networks: grouped matrix products over the rows of every slot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._problem import varying_as

GEMMS = ("auto", "xla", "mosaic")
_BLOCK_K = 64  # rows or columns that a kernel multiplies at a time


class Experts(NamedTuple):
    """Weights of gated feed-forward networks (SwiGLU, with the default activation).

    Attributes:
      gate_up: `[n, hidden, 2 · width]`: the gate's columns, then those that it multiplies.
      down: `[n, width, hidden]`.
    """

    gate_up: Any
    down: Any


def expert_ffn(
    rows: jax.Array,
    experts: Experts,
    group_sizes: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    gemm: str = "auto",
) -> jax.Array:
    """Applies every slot's expert to its rows: `(activation(x @ gate) · (x @ up)) @ down`.

    Args:
      rows: floats `[n_rows, hidden]`, slot by slot. Past the last group there may be anything.
      experts: weights of the slots, of `rows`' dtype.
      group_sizes: int32 `[slots]`, consecutive rows of every slot; their sum is at most n_rows.
      activation: elementwise.
      gemm: who multiplies. "mosaic": the Pallas kernels that come with JAX for Hopper GPUs, in
        bfloat16 or float16 and for sizes that are multiples of 128 (needs absl-py). "xla":
        `lax.ragged_dot`, for all backends and types; on a GPU it is many times slower. "auto":
        "mosaic" where the default backend and the arguments allow it.

    Returns:
      Of `rows`' shape and dtype. Rows past the last group are undefined and take no gradient.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> experts = moe.Experts(jnp.ones((2, 3, 2)), jnp.ones((2, 1, 3)))
    >>> out = moe.expert_ffn(jnp.ones((4, 3)), experts, jnp.array([1, 2]), activation=jax.nn.relu)
    >>> out[:3].tolist()
    [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    """
    _check(rows, experts, group_sizes)
    dot = _grouped_dot(_choose_gemm(gemm, rows, experts))
    experts = varying_as(experts, rows)
    # A kernel leaves rows of no group as they were in memory; anything may be there, also NaN.
    inside = jnp.arange(len(rows)) < group_sizes.sum()

    # From what the product gave, again in the backward pass: cheaper than to keep its parts.
    @jax.checkpoint
    def gated(gate_up: jax.Array) -> jax.Array:
        gate, up = (jnp.where(inside[:, None], half, 0) for half in jnp.split(gate_up, 2, axis=-1))
        return activation(gate) * up

    return dot(gated(dot(rows, experts.gate_up, group_sizes)), experts.down, group_sizes)


def _check(rows: jax.Array, experts: Experts, group_sizes: jax.Array) -> None:
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"rows: expected floats [n_rows, hidden], got {rows.dtype} {list(rows.shape)}"
        )
    check_experts(experts, rows.shape[1], rows.dtype)
    slots = len(experts.down)
    if group_sizes.shape != (slots,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes: expected int32 [slots] = [{slots}], got {group_sizes.dtype} "
            f"{list(group_sizes.shape)}"
        )


def check_experts(experts: Experts, hidden: int, dtype: Any) -> None:
    """Raises where the weights do not fit one another or the tokens."""
    if not isinstance(experts, Experts):
        raise TypeError(
            f"experts: expected a lplb_jax.moe.Experts, got {type(experts).__name__}; make one "
            f"with Experts(gate_up, down)"
        )
    gate_up, down = experts
    if gate_up.ndim != 3 or down.ndim != 3:
        fits = False
    else:
        n, width, _ = down.shape
        fits = gate_up.shape == (n, hidden, 2 * width) and down.shape == (n, width, hidden)
    if not fits:
        raise ValueError(
            f"experts: expected gate_up [n, hidden, 2 · width] and down [n, width, hidden] with "
            f"hidden = {hidden} as the tokens have, got {list(gate_up.shape)} and "
            f"{list(down.shape)}"
        )
    if gate_up.dtype != dtype or down.dtype != dtype:
        raise TypeError(
            f"experts: expected the tokens' dtype {dtype}, got {gate_up.dtype} and {down.dtype}; "
            f"convert with .astype({dtype})"
        )


def _choose_gemm(gemm: str, rows: jax.Array, experts: Experts) -> str:
    if gemm not in GEMMS:
        raise ValueError(f"gemm: expected one of {', '.join(GEMMS)}, got {gemm!r}")
    if gemm == "xla":
        return gemm
    _, width, hidden = experts.down.shape
    fits = rows.dtype in (jnp.bfloat16, jnp.float16) and hidden % 128 == 0 and width % 128 == 0
    if gemm == "mosaic" and not fits:
        raise ValueError(
            f"gemm: expected bfloat16 or float16 and multiples of 128 for 'mosaic', got "
            f"{rows.dtype}, hidden = {hidden}, width = {width}; use gemm='xla'"
        )
    return "mosaic" if gemm == "mosaic" or (fits and _on_hopper()) else "xla"


def _on_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def _grouped_dot(gemm: str) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """rows `[m, k]`, weights `[g, k, n]`, group_sizes `[g]` -> `[m, n]`, with derivatives."""
    return _xla_dot if gemm == "xla" else _mosaic_dot


def _xla_dot(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    inside = (jnp.arange(len(rows)) < group_sizes.sum())[:, None]
    out = lax.ragged_dot(jnp.where(inside, rows, 0), weights, group_sizes)
    return jnp.where(inside, out, 0)  # for the gradient that comes in here


@jax.custom_vjp
def _mosaic_dot(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _mosaic(rows, weights, group_sizes)


def _mosaic_dot_forward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows = _ended(rows, group_sizes)
    return _mosaic(rows, weights, group_sizes), (rows, weights, group_sizes)


def _mosaic_dot_backward(saved: tuple[jax.Array, ...], slope: jax.Array) -> tuple[Any, ...]:
    rows, weights, group_sizes = saved
    slope = _ended(slope, group_sizes)
    of_rows = _mosaic(slope, weights, group_sizes, transpose_rhs=True)
    # In this order: what the rows' gradients go through next is a transfer, and the product for
    # the weights, which nothing waits for, can hide it.
    of_rows, rows, slope = lax.optimization_barrier((of_rows, rows, slope))
    return of_rows, _mosaic_transposed(rows, slope, group_sizes), None


def _ended(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeros after the last group, as far as its last block reaches into what may be NaN."""
    n_block = min(_BLOCK_K, len(rows))
    end = group_sizes.sum()
    start = jnp.minimum(end, len(rows) - n_block)
    block = lax.dynamic_slice_in_dim(rows, start, n_block)
    block = jnp.where((start + jnp.arange(n_block) < end)[:, None], block, 0)
    return lax.dynamic_update_slice_in_dim(rows, block, start, axis=0)


_mosaic_dot.defvjp(_mosaic_dot_forward, _mosaic_dot_backward)


# Blocks: the fastest of those tried on an H200 with 3,277 rows per expert, within 2 % of the best
# at both of a layer's shapes; wider ones spill registers and are five times slower.
def _mosaic(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_rhs: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    n = weights.shape[1 if transpose_rhs else 2]
    out = ragged_dot(
        rows,
        weights,
        group_sizes=group_sizes,
        block_m=192,
        block_n=128,
        block_k=_BLOCK_K,
        max_concurrent_steps=4,
        grid_block_n=_neighbours(n),
        transpose_rhs=transpose_rhs,
    )
    # The kernels do not say that their results differ from rank to rank.
    return varying_as(out, rows)


def _mosaic_transposed(rows: jax.Array, slope: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """rows `[m, k]`, slope `[m, n]` -> `[g, k, n]`: the gradient of the weights."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    out = transposed_ragged_dot(
        rows,
        slope,
        group_sizes=group_sizes,
        block_m=128,
        block_n=128,
        block_k=_BLOCK_K,
        max_concurrent_steps=4,
        grid_block_n=_neighbours(slope.shape[1]),
    )
    return varying_as(out, rows)


@functools.cache
def _neighbours(n: int) -> int:
    """Blocks of columns that are computed side by side, so that they share rows in the cache."""
    return next(size for size in (8, 4, 2, 1) if n // 128 % size == 0)
