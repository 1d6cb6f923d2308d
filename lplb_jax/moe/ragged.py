"""Moves tokens by `lax.ragged_all_to_all`, where XLA can run it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native
from lplb_jax._axes import varying_as
from lplb_jax.moe.collectives import Collective, SendLists
from lplb_jax.moe.copies import numbers
from lplb_jax.reference.plan import starts


@dataclasses.dataclass(frozen=True)
class Ragged(Collective):
    """`lax.ragged_all_to_all`: only the existing tokens, in contiguous lists, on GPUs."""

    name = "ragged"
    exact = True

    def why_not_here(self) -> str | None:
        """What was seen between processes is in docs/moe.md; tests/ragged_checks.py looks again."""
        if jax.default_backend() != "gpu":
            return "it is for GPUs"
        if jax.process_count() > 1:
            return "XLA may hang or give wrong gradients there (openxla/xla issue 45406)"
        return None

    def rooms(self, n_tokens: int, top_k: int, n_ranks: int, capacity: int) -> tuple[int, int]:
        """A token goes to each rank at most once, and takes at least one row there."""
        return n_tokens * min(n_ranks, top_k), min(n_tokens * n_ranks, capacity)

    def starts_sent(self, lists: SendLists) -> jax.Array:
        """Each list starts where the previous one ends."""
        return starts(lists.sizes, axis=1)

    def arrived(self, lists: SendLists, rank: Any) -> jax.Array:
        """Everything before the end of the last list."""
        return numbers(lists.n_received) < lists.sizes[:, rank].sum(dtype=jnp.int32)

    def moved(self, array: jax.Array, lists: SendLists, way: str) -> jax.Array:
        """There or back: sending and receiving sides swap."""
        me = lax.axis_index(lists.axis_name)
        starts_sent, starts_received = self.starts_sent(lists), starts(lists.sizes, axis=0)
        source = _Slices(starts_sent[me], lists.sizes[me])
        receiver = _Slices(starts_received[:, me], lists.sizes[:, me])
        if way == "there":
            here, there, n_out = source, receiver, lists.n_received
            starts_there = starts_received[me]
        else:
            here, there, n_out = receiver, source, lists.n_sent
            starts_there = starts_sent[:, me]
        return _ragged(array, here, there, starts_there, n_out, lists.axis_name)


class _Slices(NamedTuple):
    """Parts of an array, one for every peer: int32 `[ep_size]` each."""

    starts: jax.Array
    sizes: jax.Array


def _ragged(
    array: jax.Array,
    here: _Slices,
    there: _Slices,
    starts_there: jax.Array,
    n_out: int,
    axis_name: Any,
) -> jax.Array:
    # XLA moves each piece with one thread block, and it takes some hundreds to saturate the links.
    n_pieces = -(-512 // len(here.sizes))

    def cut(starts: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = -(-sizes // n_pieces)[:, None]
        offsets = numbers(n_pieces)[None] * length
        lengths = jnp.clip(sizes[:, None] - offsets, 0, length)
        return (starts[:, None] + offsets).reshape(-1), lengths.reshape(-1)

    starts, lengths = cut(*here)
    return all_to_all(
        array,
        varying_as(lax.empty((n_out, *array.shape[1:]), array.dtype), array),
        starts,
        lengths,
        cut(starts_there, here.sizes)[0],
        cut(*there)[1],
        axis_name=axis_name,
    )


def all_to_all(
    array: jax.Array, out: jax.Array, starts: jax.Array, *others: jax.Array, axis_name: Any
) -> jax.Array:
    """`lax.ragged_all_to_all`, but on CPUs, where XLA has none, an error before the program runs.

    It is raised when the program is lowered: a program traced here may be compiled for GPUs that
    are elsewhere.
    """
    words = "transport: expected 'padded' or 'auto' on CPUs, got 'ragged', which is for GPUs"
    starts = _native.call("lplb_not_on_cpus", _itself, starts, not_cpu=words)
    return lax.ragged_all_to_all(array, out, starts, *others, axis_name=axis_name)


def _itself(array: jax.Array) -> jax.Array:
    return array
