"""The experts' feed-forward networks: grouped matrix products over the rows of every slot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lplb_jax._axes import varying_as
from lplb_jax.moe.copies import check_reverse, head, numbers, wider

GEMMS = ("auto", "xla", "mosaic")
_BLOCK_K = 64  # rows or columns that a kernel multiplies at a time
_TILE = 128  # rows that XLA multiplies at a time
# What the backward pass takes from the forward pass, besides weights.
_PRODUCTS = ("lplb_rows", "lplb_gate_up", "lplb_hidden")
_KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(*_PRODUCTS)


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
        bfloat16 or float16 and for sizes that are multiples of 128 (needs absl-py). "xla": XLA, in
        a loop over tiles of rows, for all backends and types; on a GPU it is many times slower.
        "auto": "mosaic" where the default backend and the arguments allow it.

    Returns:
      Of `rows`' shape and dtype. Rows past the last group are undefined, and the gradients of
      what stands there are 0. NaN and infinities stay with the rows of the expert that has them.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> experts = moe.Experts(jnp.ones((2, 3, 2)), jnp.ones((2, 1, 3)))
    >>> out = moe.expert_ffn(jnp.ones((4, 3)), experts, jnp.array([1, 2]), activation=jax.nn.relu)
    >>> out[:3].tolist()
    [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    """
    if gates is None:
        gates = jnp.ones(rows.shape[:1], jnp.float32)
    _check(rows, experts, group_sizes, gates)
    check_reverse("rows", (rows, experts, gates))
    rows = head(rows, group_sizes.sum(dtype=jnp.int32))
    return applied(rows, experts, group_sizes, gates, activation, gemm)


def applied(
    rows: jax.Array,
    experts: Experts,
    group_sizes: jax.Array,
    gates: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    gemm: str,
    refetch: Callable[[Experts], Experts] | None = None,
) -> jax.Array:
    """`expert_ffn` of checked arguments; rows past the last group get any gradient, also NaN.

    With `refetch` the weights of the slots are `refetch(experts)`, here and in the backward pass
    again: they are not kept in between.
    """
    if refetch is not None:

        @functools.partial(jax.checkpoint, policy=_KEEP_PRODUCTS)
        def run(rows: jax.Array, experts: Experts, gates: jax.Array) -> jax.Array:
            return applied(rows, refetch(experts), group_sizes, gates, activation, gemm)

        return run(rows, experts, gates)
    products = _XLA if _choose_gemm(gemm, rows, experts) == "xla" else _MOSAIC
    experts, gates, group_sizes = varying_as((experts, gates, group_sizes), rows)
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
    rows, gate_up, hidden = map(checkpoint_name, (rows, gate_up, hidden), _PRODUCTS)
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
    hidden = activation(gate) * up
    wide = wider(hidden.dtype, gates.dtype)
    return (hidden.astype(wide) * gates.astype(wide)).astype(gate_up.dtype)


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
    return "mosaic" if gemm == "mosaic" or (fits and _has_wgmma()) else "xla"


def _has_wgmma() -> bool:
    """The kernels are made of Hopper's wgmma, which no other generation of chips has."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and capability.split(".")[0] == "9"


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


# Neither lax.ragged_dot nor one product per group: on CPUs and GPUs, XLA makes one dense product of
# it, in which zeros stand for the rows of other groups. Zero times NaN is NaN, so one expert whose
# weights diverged would reach all tokens; and there are as many times more products as groups.


class _Tiles(NamedTuple):
    """Products of a block of rows with the weights of one group, int32 `[n_tiles]` each.

    Attributes:
      group: whose rows.
      block: where the block begins.
      first: the first row of the block that is the group's.
      end: past the last one; at most first where a tile has none.
    """

    group: jax.Array
    block: jax.Array
    first: jax.Array
    end: jax.Array


def _tiles(group_sizes: jax.Array, n_rows: int, length: int) -> _Tiles:
    """As many as there can be: groups that follow one another share one block at most."""
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
    """`step(out, tile, length, mine)` for every tile; `mine` are the rows of the tile's group."""
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


def _xla_of_weights(rows: jax.Array, slope: jax.Array, group_sizes: jax.Array) -> jax.Array:
    wide = wider(rows.dtype, jnp.float32)

    def step(out: jax.Array, tile: _Tiles, length: int, mine: jax.Array) -> jax.Array:
        of_rows, of_slope = (
            jnp.where(mine, lax.dynamic_slice_in_dim(array, tile.block, length), 0)
            for array in (rows, slope)
        )
        by_rows = (((0,), (0,)), ((), ()))
        product = lax.dot_general(of_rows, of_slope, by_rows, preferred_element_type=wide)
        return out.at[tile.group].add(product)

    out = jnp.zeros((len(group_sizes), rows.shape[1], slope.shape[1]), wide)
    return _over_tiles(step, out, group_sizes, len(rows)).astype(rows.dtype)


def _unchanged(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """No tile has rows past the last group."""
    del group_sizes
    return rows


def _zero_past_the_end(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    inside = numbers(len(rows)) < group_sizes.sum(dtype=jnp.int32)
    return jnp.where(inside[:, None], rows, 0)


def _zero_in_last_block(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Kernels read whole blocks, but none that begins past the last group."""
    n_block = min(_BLOCK_K, len(rows))
    n = group_sizes.sum(dtype=jnp.int32)
    start = jnp.minimum(n, len(rows) - n_block)
    block = lax.dynamic_slice_in_dim(rows, start, n_block)
    block = _zero_past_the_end(block, (n - start)[None])
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


_XLA = Products(_xla_of_rows, _xla_of_weights, _unchanged)
_MOSAIC = Products(_mosaic_of_rows, _mosaic_of_weights, _zero_in_last_block)
