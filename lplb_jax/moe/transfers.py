"""The order in which tokens and copies travel, forwards and backwards.

Tokens go first in both directions: the experts wait for them, and so do the layers below. The
copies' weights travel while tokens are expanded to rows, and their gradients last of all, while
those of the tokens are summed. Left alone, XLA would let the tokens wait for the copies.

Barriers enforce this order. The first one in each function holds back the copies; without the
second, XLA sees nothing to do between the start and the end of their transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax

from lplb_jax.moe.copies import Copies, add, copy


class AnyFetch(Protocol):
    """Who sends which weights to whom, along a topology or anywhere.

    Methods take one array; but where transfers must wait for one another, `delivered` and
    `sent_home` take and return lists, of the arrays that travel together.
    """

    @property
    def n_copies(self) -> int:
        """Room for copies on each rank."""
        ...

    @property
    def by_engines(self) -> bool:
        """Whether copy engines move them, which occupy no SMs."""
        ...

    def together(self, arrays: Sequence[jax.Array]) -> list[list[int]] | None:
        """Which of the arrays travel together, if each transfer must wait for the one before, of
        tokens or of copies; otherwise None."""
        ...

    def wanted(self, weights: jax.Array) -> Any:
        """The part of this rank's weights that others fetch."""

    def delivered(self, wanted: Any) -> Any:
        """Sends what is `wanted` of every rank; returns what this rank receives."""

    def write_into(self, weights: jax.Array, delivered: Any) -> jax.Array:
        """Overwrites the weights' room with the copies."""
        ...

    def sent_home(self, ct: Any, /) -> Any:
        """Sends the copies' gradients to their owners; `ct` has all slots'."""

    def accumulate(self, ct: jax.Array, home: Any) -> jax.Array:
        """Adds the gradients that came home to the owners'; room gets none."""
        ...


class Beside(NamedTuple):
    """The experts' transfers while the tokens travel.

    Attributes:
      experts: a pytree of arrays `[n, …]`.
      fetch: fetches the copies meanwhile; None without copies to fetch.
      waits: whether, in the backward pass, all slots' gradients wait for those of the tokens.
      follows: whether experts that are fetched later wait for the tokens' arrival.
    """

    experts: Any = ()
    fetch: AnyFetch | None = None
    waits: bool = False
    follows: bool = False


ALONE = Beside()  # tokens without experts

# For `jax.jit(step, compiler_options=moe.COMPILER_OPTIONS)` on GPUs: XLA starts transfers early and
# ends them late, many at a time, so that computation hides them. Between GPUs of one process, copy
# engines move copies of weights and their gradients and leave the SMs to the GEMMs.
COMPILER_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 16,
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
}


@jax.custom_vjp
def send_tokens(
    fetch: AnyFetch | None, tokens: jax.Array, copies: Copies, experts: Any
) -> tuple[jax.Array, Any]:
    """Lays the tokens out for sending; returns the experts unchanged.

    In the backward pass, the gradients of all slots wait for those of the tokens. If `expand_rows`
    fetches the copies, their gradients go home from here.
    """
    return copy(tokens, copies), experts


def _send_tokens_forward(
    fetch: AnyFetch | None, tokens: jax.Array, copies: Copies, experts: Any
) -> tuple[tuple[jax.Array, Any], tuple[AnyFetch | None, Copies]]:
    return send_tokens(fetch, tokens, copies, experts), (fetch, copies)


def _send_tokens_backward(
    saved: tuple[AnyFetch | None, Copies], cts: tuple[jax.Array, Any]
) -> tuple[None, jax.Array, None, Any]:
    fetch, copies = saved
    of_sent, of_experts = cts
    of_slots, put_back = of_floats(of_experts)
    of_sent, of_slots = lax.optimization_barrier((of_sent, of_slots))
    of_tokens = add(of_sent, copies)
    if fetch is None:
        return None, of_tokens, None, put_back(of_slots)
    home = [fetch.sent_home(ct) for ct in of_slots]
    of_tokens, home = lax.optimization_barrier((of_tokens, home))
    return (
        None,
        of_tokens,
        None,
        put_back([fetch.accumulate(ct, part) for ct, part in zip(of_slots, home, strict=True)]),
    )


send_tokens.defvjp(_send_tokens_forward, _send_tokens_backward)


def of_floats(cts: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The gradients of floats, and a function that substitutes others for them.

    The gradients of integers, such as quantized weights, are float0.
    """
    leaves, tree = jax.tree.flatten(cts)
    floats = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]

    def put_back(others: list[jax.Array]) -> Any:
        for i, other in zip(floats, others, strict=True):
            leaves[i] = other
        return tree.unflatten(leaves)

    return [leaves[i] for i in floats], put_back


@jax.custom_vjp
def expand_rows(
    fetch: AnyFetch | None, tokens: jax.Array, gates: jax.Array, copies: Copies, experts: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Expands received tokens to rows and fetches copies of experts; gates are unchanged. The
    backward pass hands the gradients of all slots on to `send_tokens`."""
    if fetch is None:
        return copy(tokens, copies), gates, experts
    leaves, tree = jax.tree.flatten(experts)
    wanted = [fetch.wanted(weights) for weights in leaves]
    received, wanted = lax.optimization_barrier(((tokens, gates, copies), wanted))
    tokens, gates, copies = received
    rows, delivered = copy(tokens, copies), [fetch.delivered(parts) for parts in wanted]
    rows, delivered = lax.optimization_barrier((rows, delivered))
    return (
        rows,
        gates,
        tree.unflatten(
            [fetch.write_into(leaf, part) for leaf, part in zip(leaves, delivered, strict=True)]
        ),
    )


def _expand_rows_forward(
    fetch: AnyFetch | None, tokens: jax.Array, gates: jax.Array, copies: Copies, experts: Any
) -> tuple[tuple[jax.Array, jax.Array, Any], Copies]:
    return expand_rows(fetch, tokens, gates, copies, experts), copies


def _expand_rows_backward(
    copies: Copies, cts: tuple[jax.Array, jax.Array, Any]
) -> tuple[None, jax.Array, jax.Array, None, Any]:
    of_rows, of_gates, of_slots = cts
    return None, add(of_rows, copies), of_gates, None, of_slots


expand_rows.defvjp(_expand_rows_forward, _expand_rows_backward)


@jax.custom_vjp
def after(tokens: jax.Array, experts: Any) -> tuple[jax.Array, Any]:
    """Both unchanged, but fetches of the experts wait for the tokens. In the backward pass neither
    waits for the other."""
    return lax.optimization_barrier((tokens, experts))


after.defvjp(
    lambda tokens, experts: (after(tokens, experts), None),
    lambda _, cts: cts,
)


@jax.custom_vjp
def beside_rows(fetch: AnyFetch | None, rows: jax.Array, experts: Any) -> tuple[jax.Array, Any]:
    """Fetches copies of experts, waiting for nothing, beside rows that no XLA exchange brings. Copy
    engines fetch them while the rows arrive; in the backward pass they move the copies' gradients
    while those of the rows are computed, see `gated_units`. Kernels would take SMs from both, so
    without copy engines the gradients leave after those of the rows. Fetches that must be in order
    follow the rows, and precede them on the way back."""
    if fetch is None:
        return rows, experts
    leaves, tree = jax.tree.flatten(experts)
    wanted, groups = list(map(fetch.wanted, leaves)), fetch.together(leaves)
    if groups is not None:
        rows, delivered = one_by_one(groups, fetch.delivered, rows, wanted)
    else:
        delivered = list(map(fetch.delivered, wanted))
    if fetch.by_engines:
        rows, delivered = lax.optimization_barrier((rows, delivered))
    return rows, tree.unflatten(map(fetch.write_into, leaves, delivered))


def one_by_one(
    groups: list[list[int]], transfer: Callable[..., Any], rows: jax.Array, arrays: list[Any]
) -> tuple[jax.Array, list[Any]]:
    """`transfer` of each group of arrays after that of the one before: the first after those of
    `rows`, and what follows with `rows` after the last."""
    results: list[Any] = [None] * len(arrays)
    for group in groups:
        rows, given = lax.optimization_barrier((rows, [arrays[i] for i in group]))
        rows, of_group = lax.optimization_barrier((rows, transfer(given)))
        for i, result in zip(group, of_group, strict=True):
            results[i] = result
    return rows, results


def _beside_forward(
    fetch: AnyFetch | None, rows: jax.Array, experts: Any
) -> tuple[tuple[jax.Array, Any], AnyFetch | None]:
    return beside_rows(fetch, rows, experts), fetch


def _beside_backward(
    fetch: AnyFetch | None, cts: tuple[jax.Array, Any]
) -> tuple[None, jax.Array, Any]:
    of_rows, of_experts = cts
    of_slots, put_back = of_floats(of_experts)
    engines = fetch is not None and fetch.by_engines
    if not engines:
        of_rows, of_slots = lax.optimization_barrier((of_rows, of_slots))
    if fetch is None:
        return None, of_rows, put_back(of_slots)
    groups = fetch.together(of_slots)
    if groups is not None:
        of_rows, home = one_by_one(groups, fetch.sent_home, of_rows, of_slots)
    else:
        home = list(map(fetch.sent_home, of_slots))
    if engines:
        of_rows, home = lax.optimization_barrier((of_rows, home))
    return None, of_rows, put_back(list(map(fetch.accumulate, of_slots, home)))


beside_rows.defvjp(_beside_forward, _beside_backward)
