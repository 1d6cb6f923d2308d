"""The native extensions: loading, version checks, registration, and the call into them."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

# FFI platform name -> extension. `_cpu` is always built, `_cuda` where nvcc was found.
_EXTENSIONS = {"cpu": "lplb_jax._cpu", "CUDA": "lplb_jax._cuda"}


def _load(name: str) -> ModuleType | None:
    try:
        extension = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    built_for = extension.jaxlib_version()
    if _as_numbers(jaxlib.__version__) < _as_numbers(built_for):
        raise ImportError(
            f"{name} was built against jaxlib {built_for} (XLA FFI {extension.ffi_version()}) and "
            f"does not run on the older jaxlib {jaxlib.__version__}: upgrade jaxlib, or rebuild "
            f"lplb_jax against it (pip install --no-build-isolation .)"
        )
    return extension


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _register() -> frozenset[str]:
    available = set()
    for platform, name in _EXTENSIONS.items():
        extension = _load(name)
        if extension is None:
            continue
        for target, handler in extension.handlers().items():
            jax.ffi.register_ffi_target(target, handler, platform=platform)
        available.add(platform)
    return frozenset(available)


AVAILABLE = _register()


def cuda() -> ModuleType | None:
    """The CUDA extension, or None where it was not built."""
    return _load(_EXTENSIONS["CUDA"]) if "CUDA" in AVAILABLE else None


@functools.cache
def _missing_on(backend: str) -> str | None:
    """Why there is no native code for the default backend, or None where there is."""
    if backend == "cpu":
        platform = "cpu"
    elif backend == "gpu" and "rocm" not in jax.devices()[0].client.platform_version.lower():
        platform = "CUDA"
    else:
        return f"lplb_jax has no native code for backend {backend!r}"
    if platform in AVAILABLE:
        return None
    remedy = {
        "cpu": "reinstall it with: pip install --force-reinstall lplb_jax",
        "CUDA": "rebuild it where nvcc is found, or with: LPLB_CUDA=pypi pip install .",
    }[platform]
    return f"lplb_jax was installed without its {platform} module; {remedy}"


def call(
    target: str,
    reference: Callable[..., Any],
    *operands: Any,
    workspace: tuple[int, ...] | None = None,
    vmap_method: str | None = "broadcast_all",
    **attributes: int,
) -> Any:
    """Runs `target` natively, or `reference` where the backend has no native code.

    The result types, device-varying axes included, are those of `reference`. `workspace` is the
    shape of an int32 buffer that the kernels may use: command buffers forbid to allocate one. With
    it, `reference` returns a tuple.
    """
    operands = tuple(jnp.asarray(operand) for operand in operands)
    missing = _missing_on(jax.default_backend())
    if missing is not None:
        _warn_once(missing)
        return jax.jit(reference, static_argnames=tuple(attributes))(*operands, **attributes)

    def results(*operands: jax.Array) -> Any:
        result = reference(*operands, **attributes)
        if workspace is None:
            return result
        return *result, jnp.broadcast_to(result[0].sum(dtype=jnp.int32), workspace)

    result = jax.ffi.ffi_call(target, jax.eval_shape(results, *operands), vmap_method=vmap_method)(
        *operands, **{name: np.int64(value) for name, value in attributes.items()}
    )
    return result if workspace is None else result[:-1]


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}. Running the slower plain-JAX reference.", stacklevel=4)
