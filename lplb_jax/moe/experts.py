"""The experts' feed-forward networks: the gated one, and the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lplb_jax._axes import varying_as
from lplb_jax._problem import check_array
from lplb_jax.moe.copies import check_reverse, head, wider
from lplb_jax.moe.products import (
    PRODUCT,
    Gemm,
    Products,
    check_group_sizes,
    check_rows,
    choose,
    zero_past_the_end,
)

# The forward pass's values that the backward pass needs, besides weights.
_PRODUCTS = ("lplb_rows", "lplb_gate_up", "lplb_hidden")
_KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(*_PRODUCTS, PRODUCT)

# Rows, experts, group sizes, gates of the rows -> rows.
Network = Callable[[jax.Array, Any, jax.Array, jax.Array], jax.Array]


class Experts(NamedTuple):
    """Weights of gated feed-forward networks (SwiGLU with the default activation).

    Attributes:
      gate_up: `[n, hidden, 2 · width]`: the gate's columns, then the columns that it multiplies.
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
    gemm: Gemm = "auto",
) -> jax.Array:
    """Applies every slot's expert to its rows: `(activation(x @ gate) · (x @ up)) @ down`.

    Args:
      rows: floats `[n_rows, hidden]`, slot by slot. Rows past the last group are ignored.
      experts: weights of the slots, of `rows`' dtype.
      group_sizes: int32 `[slots]`, consecutive rows of every slot; their sum is at most n_rows.
      gates: floats `[n_rows]` that multiply the results, from `dispatch`; None for 1. They are
        applied before the last GEMM, where rows have fewer columns than after it.
      activation: elementwise; it must not close over traced values.
      gemm: the kernels. "mosaic": the Pallas kernels that come with JAX for Hopper GPUs, in
        bfloat16 or float16 and for sizes that are multiples of 128 (needs absl-py). "xla": XLA, in
        a loop over tiles of rows, for all backends and dtypes; on a GPU it is many times slower.
        "auto": "mosaic" if the default backend and the arguments allow it.

    Returns:
      An array of `rows`' shape and dtype. Rows past the last group are undefined, and their
      gradients are 0. NaN and infinities stay with the rows of the expert that has them.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    >>> experts = moe.Experts(jnp.ones((2, 3, 2)), jnp.ones((2, 1, 3)))
    >>> out = moe.expert_ffn(jnp.ones((4, 3)), experts, jnp.array([1, 2]), activation=jax.nn.relu)
    >>> out[:3].tolist()
    [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    """
    check_rows("rows", rows)
    if gates is None:
        gates = jnp.ones(rows.shape[:1], jnp.float32)
    _check(rows, experts, group_sizes, gates)
    check_reverse("rows", (rows, experts, gates))
    rows = head(rows, group_sizes.sum(dtype=jnp.int32))
    return gated_units(activation, gemm)(rows, experts, group_sizes, gates)


def applied(
    network: Network,
    rows: jax.Array,
    experts: Any,
    group_sizes: jax.Array,
    gates: jax.Array,
    summed: Callable[[jax.Array], jax.Array],
    refetch: Callable[[Any], Any] | None = None,
) -> jax.Array:
    """Applies `network` to the rows and sums the results token by token.

    Arguments are already checked. Gradients of rows past the last group are undefined, possibly
    NaN. With `refetch`, the weights of the slots are `refetch(experts)`, here and again in the
    backward pass, so they are not kept in between. In the backward pass they may travel while the
    sums' gradients are expanded to rows.
    """

    def run(rows: jax.Array, experts: Any, gates: jax.Array) -> jax.Array:
        experts = experts if refetch is None else refetch(experts)
        return summed(network(rows, experts, group_sizes, gates))

    if refetch is not None:
        run = jax.checkpoint(run, policy=_KEEP_PRODUCTS)
    return run(rows, experts, gates)


def gated_units(
    activation: Callable[[jax.Array], jax.Array], gemm: str, *, rows_last: bool = False
) -> Network:
    """The network of `Experts`.

    In the backward pass, the second-to-last GEMM yields the rows' gradients, so that they travel
    during the last weight gradient. With `rows_last` it is the last GEMM, so that the gradients of
    the copies travel during it.
    """

    def run(
        rows: jax.Array, experts: Experts, group_sizes: jax.Array, gates: jax.Array
    ) -> jax.Array:
        _, width, hidden = experts.down.shape
        products = choose(gemm, rows.dtype, hidden=hidden, width=width)
        experts, gates, group_sizes = varying_as((experts, gates, group_sizes), rows)
        return _ffn(activation, products, rows_last, rows, experts, gates, group_sizes)

    return run


def network_of(ffn: Callable[[jax.Array, Any, jax.Array], jax.Array]) -> Network:
    """The user's network, which sees neither gates nor data past the last group."""

    def run(rows: jax.Array, experts: Any, group_sizes: jax.Array, gates: jax.Array) -> jax.Array:
        experts, gates, group_sizes = varying_as((experts, gates, group_sizes), rows)
        rows = checkpoint_name(zero_past_the_end(rows, group_sizes), _PRODUCTS[0])
        out = ffn(rows, experts, group_sizes)
        is_array = isinstance(out, jax.Array)
        if not is_array or out.ndim != 2 or len(out) != len(rows):
            got = list(out.shape) if is_array else type(out).__name__
            raise ValueError(
                f"ffn: expected it to return an array [n_rows, …] = [{len(rows)}, …], got {got}"
            )
        check_rows("ffn", out)
        gates = zero_past_the_end(gates[:, None], group_sizes)
        wide = wider(out.dtype, gates.dtype)
        out = (varying_as(out, rows).astype(wide) * gates.astype(wide)).astype(out.dtype)
        return head(out, group_sizes.sum(dtype=jnp.int32))

    return run


def _ffn_forward(
    activation: Callable[[jax.Array], jax.Array],
    products: Products,
    rows_last: bool,
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
    rows_last: bool,
    saved: tuple[Any, ...],
    ct: jax.Array,
) -> tuple[Any, ...]:
    rows, experts, gates, group_sizes, gate_up, hidden = saved
    ct = products.cleaned(ct, group_sizes)
    of_hidden = products.of_rows(ct, experts.down, group_sizes, transposed=True)
    _, pull = jax.vjp(
        lambda gate_up, gates: _gated(activation, gate_up, gates, group_sizes), gate_up, gates
    )
    # Both now: the gates' gradients would keep gate_up and of_hidden until after the GEMMs.
    of_gate_up, of_gates = lax.optimization_barrier(pull(of_hidden))
    first = products.of_weights(rows, of_gate_up, group_sizes)
    if rows_last:
        first, hidden = lax.optimization_barrier((first, hidden))
        last = products.of_weights(hidden, ct, group_sizes)
        first, last, of_gate_up = lax.optimization_barrier((first, last, of_gate_up))
        of_rows = products.of_rows(of_gate_up, experts.gate_up, group_sizes, transposed=True)
        return of_rows, Experts(first, last), of_gates, None
    # The last GEMM does not depend on the tokens' transfer, so XLA may overlap the two. The copies'
    # gradients leave after it: an NCCL kernel that waits for its peer occupies SMs, and a
    # persistent GEMM that lacks an SM takes twice as long.
    first, of_gate_up = lax.optimization_barrier((first, of_gate_up))
    of_rows = products.of_rows(of_gate_up, experts.gate_up, group_sizes, transposed=True)
    of_rows, hidden = lax.optimization_barrier((of_rows, hidden))
    last = products.of_weights(hidden, ct, group_sizes)
    first, last = lax.optimization_barrier((first, last))
    return of_rows, Experts(first, last), of_gates, None


_ffn = jax.custom_vjp(lambda *arguments: _ffn_forward(*arguments)[0], nondiff_argnums=(0, 1, 2))
_ffn.defvjp(_ffn_forward, _ffn_backward)


def _gated(
    activation: Callable[[jax.Array], jax.Array],
    gate_up: jax.Array,
    gates: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """Zeroes the result past the last group, where kernels leave memory as it was."""
    gate, up, gates = (
        zero_past_the_end(part, group_sizes)
        for part in (*jnp.split(gate_up, 2, axis=-1), gates[:, None])
    )
    hidden = activation(gate) * up
    wide = wider(hidden.dtype, gates.dtype)
    return (hidden.astype(wide) * gates.astype(wide)).astype(gate_up.dtype)


def _check(rows: jax.Array, experts: Experts, group_sizes: jax.Array, gates: jax.Array) -> None:
    check_experts(experts, rows.shape[1], rows.dtype)
    check_group_sizes(group_sizes, len(experts.down))
    check_array("gates", gates, "floats [n_rows]")
    if gates.shape != rows.shape[:1] or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(
            f"gates: expected floats [n_rows] = [{len(rows)}], got {gates.dtype} "
            f"{list(gates.shape)}"
        )


def check_experts(experts: Experts, hidden: int, dtype: Any) -> None:
    """Raises if the weights do not match one another or the tokens."""
    if not isinstance(experts, Experts):
        raise TypeError(
            f"experts: expected a lplb_jax.moe.Experts, got {type(experts).__name__}; make one "
            f"with Experts(gate_up, down), or pass ffn, a network for yours"
        )
    gate_up, down = experts
    check_array("experts.gate_up", gate_up, "[n, hidden, 2 · width]")
    check_array("experts.down", down, "[n, width, hidden]")
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


def check_tree(experts: Any) -> None:
    """Raises if the experts of an `ffn` are not arrays `[n, …]` with a common n."""
    leaves = jax.tree_util.tree_leaves_with_path(experts)
    if not leaves:
        raise ValueError("experts: expected a pytree with arrays [n, …], got one without leaves")
    for path, leaf in leaves:
        if not jnp.isscalar(leaf):
            check_array(f"experts{jax.tree_util.keystr(path)}", leaf, "[n, …]")
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    n = next((shape[0] for shape in shapes.values() if shape), None)
    for path, shape in shapes.items():
        if not shape or shape[0] != n:
            raise ValueError(
                f"experts: expected arrays [n, …] with one n, got {list(shape)} for "
                f"experts{path} and n = {n}; let ffn close over what all experts share"
            )
