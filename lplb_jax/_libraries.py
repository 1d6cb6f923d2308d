"""NVIDIA's shared libraries, found at run time."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib


def find(soname: str, package: str) -> ctypes.CDLL | None:
    """The library that is already loaded, or else the wheel's: two instances share no state.

    JAX's CUDA plugin loads NCCL and NVSHMEM from their wheels, unless LD_PRELOAD provides them.

    Args:
      soname: such as "libnccl.so.2".
      package: the wheel's folder in `nvidia`.

    Returns:
      The library, or None if there is none.
    """
    candidates = [(soname, os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_GLOBAL)]
    spec = importlib.util.find_spec("nvidia")
    for path in (spec.submodule_search_locations or []) if spec else []:
        file = pathlib.Path(path) / package / "lib" / soname
        if file.exists():
            candidates.append((str(file), os.RTLD_NOW | os.RTLD_GLOBAL))
    for name, mode in candidates:
        try:
            return ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
    return None
