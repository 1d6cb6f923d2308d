"""What carries the tokens: one of XLA's collectives, or the GPUs themselves."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Literal, get_args

import jax
from jaxlib import version

from lplb_jax import _libraries
from lplb_jax._native import as_numbers

Transport = Literal["auto", "padded", "ragged"]
TRANSPORTS = get_args(Transport)
TokenTransport = Literal["auto", "padded", "ragged", "peer"]

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


def choose_for_tokens(transport: str, n_ranks: int) -> str:
    """ "peer" or what `choose` chooses. That is not a way for weights."""
    if transport == "peer":
        return transport
    if transport not in TRANSPORTS:
        names = ", ".join(get_args(TokenTransport))
        raise ValueError(f"transport: expected one of {names}, got {transport!r}")
    return choose(transport, n_ranks)


def choose(transport: str, n_ranks: int) -> str:
    """ "ragged" or "padded", whatever was asked for; all processes choose alike."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
    alone = jax.process_count() == 1
    if transport == "auto":
        return "ragged" if jax.default_backend() == "gpu" and alone else "padded"
    # JAX does not tell whose ranks an axis has; where a process may have them all, it is believed.
    if transport == "ragged" and not alone and n_ranks > jax.local_device_count():
        reason = why_not_ragged(n_ranks)
        if reason is not None:
            raise ValueError(
                f"transport: expected 'padded' or 'auto', got 'ragged', which {n_ranks} ranks of "
                f"several processes cannot have: {reason}"
            )
    return transport


def why_not_ragged(n_ranks: int) -> str | None:
    """Why `lax.ragged_all_to_all` does not run between processes, or None where it does.

    XLA refuses it only when the program runs.
    """
    if jax.default_backend() != "gpu":
        return "it is for GPUs"
    if as_numbers(version.__version__) < _JAXLIB:
        return f"it needs jaxlib {_dotted(_JAXLIB)} or newer, and this is {version.__version__}"
    nccl = nccl_version()
    if nccl is None or nccl < _NCCL:
        return (
            f"it needs NCCL {_dotted(_NCCL)} or newer, and {_dotted(nccl) if nccl else 'none'} is "
            f"loaded; get it with: pip install 'nvidia-nccl-cu13>={_dotted(_NCCL)}'"
        )
    if n_ranks > _MOST_RANKS:
        return f"it takes at most {_MOST_RANKS} ranks"
    if len({getattr(device, "slice_index", 0) for device in jax.devices()}) > 1:
        return "the GPUs are of several hosts"
    for name, value in _WITHOUT_WINDOWS.items():
        if os.environ.get(name) is not None and value in (None, os.environ[name]):
            return f"NCCL has no windows with {name}={os.environ[name]}"
    return None


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
