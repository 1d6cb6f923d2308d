"""The native extensions: loading, version checks, registration, and the call into them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import version

# FFI platform name -> extension. `_cpu` is always built, `_cuda` if nvcc was found.
_EXTENSIONS = {"cpu": "lplb_jax._cpu", "CUDA": "lplb_jax._cuda"}


def _load(name: str) -> ModuleType | None:
    try:
        extension = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    built_for = extension.jaxlib_version()
    if as_numbers(version.__version__) < as_numbers(built_for):
        raise ImportError(
            f"{name} was built against jaxlib {built_for} (XLA FFI {extension.ffi_version()}) and "
            f"does not run on the older jaxlib {version.__version__}: upgrade jaxlib, or rebuild "
            f"lplb_jax against it (pip install --no-build-isolation .)"
        )
    return extension


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _register() -> dict[str, tuple[str, ...]]:
    registered = {}
    for platform, name in _EXTENSIONS.items():
        extension = _load(name)
        if extension is None:
            continue
        handlers = extension.handlers()
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(target, handler, platform=platform)
        registered[platform] = tuple(handlers)
    return registered


# FFI platform name -> its registered targets.
AVAILABLE = _register()


def cpu() -> ModuleType | None:
    """The CPU extension, or None if it was not built."""
    return _load(_EXTENSIONS["cpu"]) if "cpu" in AVAILABLE else None


def cuda() -> ModuleType | None:
    """The CUDA extension, or None if it was not built."""
    return _load(_EXTENSIONS["CUDA"]) if "CUDA" in AVAILABLE else None


def built_cuda() -> ModuleType:
    """The CUDA extension, for callers that know it was built."""
    extension = cuda()
    assert extension is not None
    return extension


def call(
    target: str,
    reference: Callable[..., Any],
    *operands: Any,
    axis_name: Any = None,
    workspace: tuple[int, ...] | None = None,
    only_cuda: str | None = None,
    not_cpu: str | None = None,
    in_place: tuple[tuple[int, int], ...] = (),
    **attributes: int,
) -> Any:
    """Runs `target` natively, or `reference` if the platform has no native code.

    The choice is made when the program is lowered, since an array may be on a platform other than
    JAX's default.

    Args:
      target: name of the FFI target. It takes leading batch axes, the same on all operands.
      reference: the specification, called with `operands` and `attributes`. It defines the result
        types, including device-varying axes.
      operands: arrays. Empty NumPy arrays, such as the columns of no topology, are no values of the
        program: under `jax.checkpoint` they would be residuals, and XLA's partitioner crashes over
        empty arrays that enter or leave a `shard_map`.
      axis_name: mapped axes of a target that waits for other ranks; `reference` takes them, too.
        `vmap` over such a call raises.
      workspace: shape of an int32 scratch buffer for the kernels, which must not allocate in
        command buffers. With it, `reference` returns a tuple.
      only_cuda: the error message if the program is lowered for a platform other than CUDA; None
        if that is allowed.
      not_cpu: the same for a program lowered for CPUs.
      in_place: pairs of an operand and a result that share a buffer in native code. If the operand
        is needed later, XLA copies it.
      attributes: integers for `target` and `reference`.
    """
    operation = _Operation(
        target,
        reference,
        tuple(sorted(attributes.items())),
        axis_name,
        workspace,
        only_cuda,
        not_cpu,
        in_place,
        tuple((i, o.shape, o.dtype.name) for i, o in enumerate(operands) if _is_nothing(o)),
    )
    # Batches are on their device by now; only small tables still have to be transferred.
    with jax.transfer_guard("allow"):
        arrays = [whole(operand) for operand in operands if not _is_nothing(operand)]
        results = _call.bind(*arrays, operation=operation, n_batch=0)
    if workspace is not None:
        return tuple(results[:-1])
    return tuple(results) if len(results) > 1 else results[0]


def _is_nothing(operand: Any) -> bool:
    return isinstance(operand, np.ndarray) and operand.size == 0


def whole(array: Any) -> jax.Array:
    """`array` without explicit sharding: native code sees all of it."""
    if _is_nothing(array):
        # Computed in the program: XLA of jax 0.11 crashes on empty constants in shard_map on CPUs.
        array = jnp.zeros(array.shape, array.dtype)
    array = jnp.asarray(array)
    sharding = jax.typeof(array).sharding
    if all(axes is None for axes in sharding.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_as(array: jax.Array, like: Any) -> jax.Array:
    """`array` with the explicit sharding of `like`, which has the same shape."""
    if not isinstance(like, jax.Array):
        return array
    sharding = jax.typeof(like).sharding
    if all(axes is None for axes in sharding.spec):
        return array
    return jax.sharding.reshard(array, sharding)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A call without its operands, see `call`. Hashable: equal calls share traces and programs."""

    target: str
    reference: Callable[..., Any]
    attributes: tuple[tuple[str, int], ...]
    axis_name: Any
    workspace: tuple[Any, ...] | None
    only_cuda: str | None
    not_cpu: str | None
    in_place: tuple[tuple[int, int], ...]
    empty: tuple[tuple[int, tuple[int, ...], str], ...]  # operands: place, shape and dtype

    def __repr__(self) -> str:
        attributes = ", ".join(f"{name}={value}" for name, value in self.attributes)
        return f"{self.target}({attributes})"

    def all_of(self, operands: Sequence[jax.Array], *batch: int) -> list[jax.Array]:
        """The operands with the empty ones among them."""
        operands = list(operands)
        for place, shape, dtype in self.empty:
            operands.insert(place, jnp.zeros((*batch, *shape), dtype))
        return operands


# One primitive for all targets instead of jax.ffi.ffi_call, which cannot fall back to another way
# of computing the result.
_call = jax.extend.core.Primitive("lplb_call")
_call.multiple_results = True


@functools.lru_cache(maxsize=1024)
def _specification(operation: _Operation, n_batch: int) -> Callable[..., Sequence[jax.Array]]:
    """The reference over `n_batch` leading axes, with a placeholder result for the workspace."""
    options: dict[str, Any] = dict(operation.attributes)
    if operation.axis_name is not None:
        options["axis_name"] = operation.axis_name

    def results(*operands: jax.Array) -> Sequence[jax.Array]:
        result = operation.reference(*operation.all_of(operands), **options)
        result = list(result) if isinstance(result, tuple) else [result]
        if operation.workspace is not None:
            varying = result[0].sum(dtype=jnp.int32)
            result.append(jnp.broadcast_to(varying, operation.workspace))
        return result

    for _ in range(n_batch):
        results = jax.vmap(results)
    return jax.jit(results)


@_call.def_abstract_eval
def _(*operands: Any, operation: _Operation, n_batch: int) -> Sequence[Any]:
    return jax.make_jaxpr(_specification(operation, n_batch))(*operands).out_avals


@_call.def_impl
def _(*operands: jax.Array, operation: _Operation, n_batch: int) -> Sequence[jax.Array]:
    with jax.disable_jit(False):  # What runs here is one operation, jit or not.
        return _program(operation, n_batch)(*operands)


@functools.lru_cache(maxsize=1024)
def _program(operation: _Operation, n_batch: int) -> Callable[..., Sequence[jax.Array]]:
    return jax.jit(functools.partial(_call.bind, operation=operation, n_batch=n_batch))


def _batch(
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    operation: _Operation,
    n_batch: int,
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """Moves the new axis to the front of all operands."""
    pairs = list(zip(operands, axes, strict=True))
    (size,) = {operand.shape[axis] for operand, axis in pairs if axis is not None}
    if operation.axis_name is not None:
        raise ValueError(
            f"comm: a call that waits for other ranks cannot be mapped by vmap (here over {size} "
            f"elements); use jax.lax.map or scan, or put vmap around the steps that do not wait"
        )
    mapped = [s for s in (_sharding_of_axis(*pair) for pair in pairs) if s is not None]
    operands = [
        jnp.broadcast_to(operand, (size, *operand.shape))
        if axis is None
        else whole(jnp.moveaxis(operand, axis, 0))
        for operand, axis in pairs
    ]
    results = _call.bind(*operands, operation=operation, n_batch=n_batch + 1)
    if mapped:
        # JAX assumes that all mapped arrays are sharded along the new axis like the operands.
        results = [jax.sharding.reshard(result, mapped[0]) for result in results]
    return results, (0,) * len(results)


def _sharding_of_axis(array: jax.Array, axis: int | None) -> NamedSharding | None:
    """How explicit mesh axes shard `axis` of `array`, for the first axis of another array."""
    sharding = jax.typeof(array).sharding
    names = None if axis is None else sharding.spec[axis]
    return None if names is None else NamedSharding(sharding.mesh, PartitionSpec(names))


batching.primitive_batchers[_call] = _batch


def _differentiate(_: Any, __: Any, *, operation: _Operation, n_batch: int) -> Any:
    raise ValueError(
        f"{operation.target}: a split has no derivative; apply jax.lax.stop_gradient to the loads "
        f"and weights that it depends on"
    )


ad.primitive_jvps[_call] = _differentiate


def _with_empty(operation: _Operation, n_batch: int) -> Callable[..., Sequence[jax.Array]]:
    """The same call with all of its operands."""
    alike = dataclasses.replace(operation, empty=())

    def call_with_empty(*operands: jax.Array) -> Sequence[jax.Array]:
        batch = operands[0].shape[:n_batch] if operands else ()
        every = operation.all_of(operands, *batch)
        return _call.bind(*every, operation=alike, n_batch=n_batch)

    return call_with_empty


def _lowering(ffi_platform: str | None) -> Callable[..., Any]:
    """The lowering rule for a platform with an extension, or for all others if None."""

    def lower(ctx: Any, *operands: Any, operation: _Operation, n_batch: int) -> Any:
        if operation.only_cuda is not None and ffi_platform != "CUDA":
            raise ValueError(operation.only_cuda)
        if operation.not_cpu is not None and ffi_platform == "cpu":
            raise ValueError(operation.not_cpu)
        if operation.target in AVAILABLE.get(ffi_platform or "", ()):
            if operation.empty:
                return mlir.lower_fun(_with_empty(operation, n_batch))(ctx, *operands)
            attributes = {name: np.int64(value) for name, value in operation.attributes}
            shared = dict(operation.in_place)
            native = jax.ffi.ffi_lowering(operation.target, operand_output_aliases=shared)
            return native(ctx, *operands, **attributes)
        if ffi_platform not in AVAILABLE:
            platforms = ctx.platforms or ctx.module_context.platforms
            missing = _why_missing(ffi_platform, ", ".join(platforms))
            warn_once(f"{missing}. Running the slower plain-JAX reference.")
        return mlir.lower_fun(_specification(operation, n_batch))(ctx, *operands)

    return lower


mlir.register_lowering(_call, _lowering(None))
mlir.register_lowering(_call, _lowering("cpu"), platform="cpu")
mlir.register_lowering(_call, _lowering("CUDA"), platform="cuda")


def _why_missing(ffi_platform: str | None, platform: str) -> str:
    """Why native code is missing, and what to do."""
    if ffi_platform is None:
        return f"lplb_jax has no native code for platform {platform!r}"
    remedy = {
        "cpu": "reinstall it in its source tree with: pip install --force-reinstall --no-deps .",
        "CUDA": "reinstall it in its source tree, where nvcc is found or with: "
        "LPLB_CUDA=pypi pip install --force-reinstall --no-deps .",
    }[ffi_platform]
    return f"lplb_jax was installed without its {ffi_platform} module; {remedy}"


@functools.cache
def warn_once(message: str) -> None:
    """Warns once, at the first caller outside this library and JAX."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in _NOT_THE_CALLER:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_NOT_THE_CALLER = ("lplb_jax", "jax", "contextlib")
