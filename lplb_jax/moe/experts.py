"""The experts' feed-forward networks: grouped matrix products over the rows of every slot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax._axes import varying_as

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
    gates: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    gemm: str = "auto",
) -> jax.Array:
    """Applies every slot's expert to its rows: `(activation(x @ gate) · (x @ up)) @ down`.

    Args:
      rows: floats `[n_rows, hidden]`, slot by slot. Past the last group there may be anything.
      experts: weights of the slots, of `rows`' dtype.
      group_sizes: int32 `[slots]`, consecutive rows of every slot; their sum is at most n_rows.
      gates: floats `[n_rows]` to multiply the results with, as `dispatch` gave them; None for 1.
        It is done before the last product, where there are fewer columns than after it.
      activation: elementwise, without traced values of its own.
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
    if gates is None:
        gates = jnp.ones(rows.shape[:1])
    _check(rows, experts, group_sizes, gates)
    products = _XLA if _choose_gemm(gemm, rows, experts) == "xla" else _MOSAIC
    experts, gates = varying_as((experts, gates), rows)
    return _ffn(activation, products, rows, experts, gates, group_sizes)


def _ffn_forward(
    activation: Callable[[jax.Array], jax.Array],
    products: Products,
    rows: jax.Array,
    experts: Experts,
    gates: jax.Array,
    group_sizes: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    rows = products.cleaned(rows, group_sizes)
    gate_up = products.of_rows(rows, experts.gate_up, group_sizes)
    hidden = _gated(activation, gate_up, gates, group_sizes)
    out = products.of_rows(hidden, experts.down, group_sizes)
    return out, (rows, experts, gates, group_sizes, gate_up, hidden)


def _ffn_backward(
    activation: Callable[[jax.Array], jax.Array],
    products: Products,
    saved: tuple[Any, ...],
    slope: jax.Array,
) -> tuple[Any, ...]:
    rows, experts, gates, group_sizes, gate_up, hidden = saved
    slope = products.cleaned(slope, group_sizes)
    of_hidden = products.of_rows(slope, experts.down, group_sizes, transposed=True)
    _, pull = jax.vjp(
        lambda gate_up, gates: _gated(activation, gate_up, gates, group_sizes), gate_up, gates
    )
    of_gate_up, of_gates = pull(of_hidden)
    # The last product does not need the tokens' way back, which XLA may put beside it. The copies'
    # gradients leave after that product: a kernel of NCCL that waits for its peer would hold
    # multiprocessors back from it, and a persistent product that lacks one takes twice as long.
    first = products.of_weights(rows, of_gate_up, group_sizes)
    first, of_gate_up = lax.optimization_barrier((first, of_gate_up))
    of_rows = products.of_rows(of_gate_up, experts.gate_up, group_sizes, transposed=True)
    of_rows, hidden = lax.optimization_barrier((of_rows, hidden))
    last = products.of_weights(hidden, slope, group_sizes)
    first, last = lax.optimization_barrier((first, last))
    return of_rows, Experts(first, last), of_gates, None


_ffn = jax.custom_vjp(lambda *arguments: _ffn_forward(*arguments)[0], nondiff_argnums=(0, 1))
_ffn.defvjp(_ffn_forward, _ffn_backward)


def _gated(
    activation: Callable[[jax.Array], jax.Array],
    gate_up: jax.Array,
    gates: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """Zero past the last group, whatever was there; kernels leave memory as it was."""
    gate, up, gates = (
        _zero_past_the_end(part, group_sizes)
        for part in (*jnp.split(gate_up, 2, axis=-1), gates[:, None])
    )
    return (activation(gate) * up * gates).astype(gate_up.dtype)


def _check(rows: jax.Array, experts: Experts, group_sizes: jax.Array, gates: jax.Array) -> None:
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
    if gates.shape != rows.shape[:1] or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(
            f"gates: expected floats [n_rows] = [{len(rows)}], got {gates.dtype} "
            f"{list(gates.shape)}"
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


class Products(NamedTuple):
    """Who multiplies.

    Attributes:
      of_rows: rows `[m, k]`, weights `[g, k, n]` (or `transposed`: `[g, n, k]`), sizes -> `[m, n]`.
      of_weights: rows `[m, k]`, slope `[m, n]`, sizes -> `[g, k, n]`.
      cleaned: rows `[m, k]`, sizes -> the same, so that what is past the last group does no harm.
    """

    of_rows: Callable[..., jax.Array]
    of_weights: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    cleaned: Callable[[jax.Array, jax.Array], jax.Array]


def _xla_of_rows(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transposed: bool = False
) -> jax.Array:
    return lax.ragged_dot(rows, weights.swapaxes(1, 2) if transposed else weights, group_sizes)


def _xla_of_weights(rows: jax.Array, slope: jax.Array, group_sizes: jax.Array) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(rows, slope, group_sizes, dims)


def _zero_past_the_end(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(len(rows)) < group_sizes.sum())[:, None], rows, 0)


def _zero_in_last_block(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Kernels read whole blocks, but none that begins past the last group."""
    n_block = min(_BLOCK_K, len(rows))
    start = jnp.minimum(group_sizes.sum(), len(rows) - n_block)
    block = lax.dynamic_slice_in_dim(rows, start, n_block)
    block = _zero_past_the_end(block, group_sizes.sum(keepdims=True) - start)
    return lax.dynamic_update_slice_in_dim(rows, block, start, axis=0)


# Blocks: the fastest of those tried on an H200 with 3,277 rows per expert, within 2 % of the best
# at both of a layer's shapes; wider ones spill registers and are five times slower.
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
    # The kernels do not say that their results differ from rank to rank.
    return varying_as(out, rows)


def _mosaic_of_weights(rows: jax.Array, slope: jax.Array, group_sizes: jax.Array) -> jax.Array:
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


_XLA = Products(_xla_of_rows, _xla_of_weights, _zero_past_the_end)
_MOSAIC = Products(_mosaic_of_rows, _mosaic_of_weights, _zero_in_last_block)
