"""Tokens by `lax.ragged_all_to_all`, and where XLA can run it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxlib import version

from lplb_jax import _libraries
from lplb_jax._axes import varying_as
from lplb_jax._native import as_numbers
from lplb_jax.moe.collectives import Collective, SendLists
from lplb_jax.moe.copies import numbers
from lplb_jax.reference.plan import starts

# What XLA's one-shot kernel over NCCL's windows needs, its only fast way between processes. It asks
# NCCL for the NVLink domain by calls that are there since 2.29.7.
_JAXLIB, _NCCL = (0, 11, 1), (2, 29, 7)
_MOST_RANKS = 32  # beyond them it writes past its tables: openxla/xla issue 47283
# Settings with which NCCL makes no windows, or not over all ranks of a host.
_WITHOUT_WINDOWS = {
    "NCCL_HOSTID": None,
    "NCCL_P2P_DISABLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_WIN_ENABLE": "0",
}
# XLA registers the memory of results as windows, together with all ranks, and remembers it by its
# address. Only in one pool that is taken at the start do ranks agree on what is registered already;
# else one waits forever for another that sees no need to: openxla/xla issues 45406 and 47406.
_WITHOUT_POOL = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": ("false", "False", "0"),
    "XLA_PYTHON_CLIENT_ALLOCATOR": ("platform", "cuda_async", "vmm", "address"),
}


@dataclasses.dataclass(frozen=True)
class Ragged(Collective):
    """`lax.ragged_all_to_all`: exactly the tokens there are, one list behind the other, on GPUs."""

    name = "ragged"
    exact = True

    def why_not_over(self, n_ranks: int) -> str | None:
        """XLA itself refuses it only when the program runs."""
        if jax.default_backend() != "gpu":
            return "it is for GPUs"
        if jax.process_count() == 1:
            return None
        if as_numbers(version.__version__) < _JAXLIB:
            return f"it needs jaxlib {_dotted(_JAXLIB)} or newer, and this is {version.__version__}"
        nccl = nccl_version()
        if nccl is None or nccl < _NCCL:
            return (
                f"it needs NCCL {_dotted(_NCCL)} or newer, and "
                f"{_dotted(nccl) if nccl else 'none'} is loaded; get it with: "
                f"pip install 'nvidia-nccl-cu13>={_dotted(_NCCL)}'"
            )
        if n_ranks > _MOST_RANKS:
            return f"it takes at most {_MOST_RANKS} ranks"
        if len({getattr(device, "slice_index", 0) for device in jax.devices()}) > 1:
            return "the GPUs are of several hosts"
        for name, value in _WITHOUT_WINDOWS.items():
            if os.environ.get(name) is not None and value in (None, os.environ[name]):
                return f"NCCL has no windows with {name}={os.environ[name]}"
        for name, values in _WITHOUT_POOL.items():
            if os.environ.get(name) in values:
                return f"with {name}={os.environ[name]} ranks may wait for each other forever"
        return None

    def rooms(self, n_tokens: int, top_k: int, n_ranks: int, capacity: int) -> tuple[int, int]:
        """A token goes to every rank once at most, and a rank has a row at least for each."""
        return n_tokens * min(n_ranks, top_k), min(n_tokens * n_ranks, capacity)

    def starts_sent(self, lists: SendLists) -> jax.Array:
        """One begins where the one before ends."""
        return starts(lists.sizes, axis=1)

    def arrived(self, lists: SendLists, rank: Any) -> jax.Array:
        """Before the end of the last."""
        return numbers(lists.n_received) < lists.sizes[:, rank].sum(dtype=jnp.int32)

    def moved(self, array: jax.Array, lists: SendLists, way: str) -> jax.Array:
        """There or back: what one sends the other receives."""
        me = lax.axis_index(lists.axis_name)
        starts_sent, starts_received = self.starts_sent(lists), starts(lists.sizes, axis=0)
        source = _Slices(starts_sent[me], lists.sizes[me])
        receiver = _Slices(starts_received[:, me], lists.sizes[:, me])
        if way == "there":
            here, there, n_out, starts_there = (
                source,
                receiver,
                lists.n_received,
                starts_received[me],
            )
        else:
            here, there, n_out, starts_there = receiver, source, lists.n_sent, starts_sent[:, me]
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
    # XLA moves a piece by one block of threads, of which it takes some hundreds to fill the links.
    n_pieces = -(-512 // len(here.sizes))

    def cut(starts: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = -(-sizes // n_pieces)[:, None]
        offsets = numbers(n_pieces)[None] * length
        lengths = jnp.clip(sizes[:, None] - offsets, 0, length)
        return (starts[:, None] + offsets).reshape(-1), lengths.reshape(-1)

    starts, lengths = cut(*here)
    return lax.ragged_all_to_all(
        array,
        varying_as(lax.empty((n_out, *array.shape[1:]), array.dtype), array),
        starts,
        lengths,
        cut(starts_there, here.sizes)[0],
        cut(*there)[1],
        axis_name=axis_name,
    )


@functools.cache
def nccl_version() -> tuple[int, int, int] | None:
    """Of the library that XLA uses, or None where there is none."""
    library = _libraries.find("libnccl.so.2", "nccl")
    code = ctypes.c_int()
    if library is None or library.ncclGetVersion(ctypes.byref(code)) != 0:
        return None
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
