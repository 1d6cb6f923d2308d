"""NVIDIA's shared libraries, found at run time."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib


def find(soname: str, package: str) -> ctypes.CDLL | None:
    """The library that is already loaded, else that of the wheel: two would not know each other.

    JAX's CUDA plugin loads NCCL and NVSHMEM of their wheels, and LD_PRELOAD may come before it.

    Args:
      soname: "libnccl.so.2".
      package: the wheel's folder below `nvidia`.

    Returns:
      The library, or None where there is none.
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
