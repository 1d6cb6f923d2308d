"""NVSHMEM's host library, found at run time: joining its job, and symmetric memory."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import importlib.util
import os
import pathlib
import re

from lplb_jax import _native
from lplb_jax._rendezvous import Rendezvous

_SONAME = "libnvshmem_host.so.3"
_INIT_WITH_UNIQUE_ID = 1 << 3
_READY = 2  # nvshmemx_init_status: from this value on the library is usable


class _UniqueId(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int), ("internal", ctypes.c_char * 124)]


class _UniqueIdArgs(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("id", ctypes.POINTER(_UniqueId)),
        ("my_rank", ctypes.c_int),
        ("n_ranks", ctypes.c_int),
    ]


class _InitArgs(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("unique_id", _UniqueIdArgs),
        ("content", ctypes.c_char * 96),
    ]


class _InitAttributes(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int), ("mpi_comm", ctypes.c_void_p), ("args", _InitArgs)]


def _version(structure: type[ctypes.Structure]) -> int:
    return (1 << 16) + ctypes.sizeof(structure)


def _found() -> ctypes.CDLL | None:
    """The library that is already loaded, or else the wheel's: two instances share no state.

    JAX's CUDA plugin loads it from its wheel, unless LD_PRELOAD provides it.
    """
    candidates = [(_SONAME, os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_GLOBAL)]
    spec = importlib.util.find_spec("nvidia")
    for path in (spec.submodule_search_locations or []) if spec else []:
        file = pathlib.Path(path) / "nvshmem" / "lib" / _SONAME
        if file.exists():
            candidates.append((str(file), os.RTLD_NOW | os.RTLD_GLOBAL))
    for name, mode in candidates:
        try:
            return ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
    return None


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = _found()
    if library is not None:
        library.nvshmem_malloc.restype = ctypes.c_void_p
        library.nvshmem_malloc.argtypes = [ctypes.c_size_t]
        library.nvshmem_free.argtypes = [ctypes.c_void_p]
        library.nvshmem_ptr.restype = ctypes.c_void_p
        library.nvshmem_ptr.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def missing() -> str | None:
    """Why NVSHMEM is missing, or None if it is available."""
    if _library() is None:
        return f"{_SONAME} was not found; install it with: pip install nvidia-nvshmem-cu13"
    return None


def _loaded() -> ctypes.CDLL:
    """The library, once `missing` has returned None."""
    library = _library()
    assert library is not None
    return library


Version = tuple[int, int, int]


def missing_put() -> str | None:
    """Why put-with-signal is not available, or None if it is."""
    file = _put_file()
    if file is None:
        return (
            "lplb_jax was installed without NVSHMEM's device library; reinstall it with: "
            "LPLB_NVSHMEM=on pip install ."
        )
    return incompatible(built_version(file), host_version())


def incompatible(built: Version, host: Version) -> str | None:
    """Why a host library cannot run device code of version `built`, or None if it can.

    Within a major version, a host library runs device code of its own and of older minor versions:
    see the release notes of NVSHMEM 3.0.6, and nvshmemi_is_version_compatible in its init.cu. The
    exception is IBGDA, whose queue pairs changed their layout in 3.5.19, see its release notes.
    """
    older = built[:2] < (3, 5) <= host[:2]
    if built[0] == host[0] and built[1] <= host[1] and not (older and _uses_ibgda()):
        return None
    return (
        f"lplb_jax was built with NVSHMEM {_dotted(built)}, and the host library here is "
        f"{_dotted(host)}, which does not run its device code"
        + (" while NVSHMEM_IB_ENABLE_IBGDA is set" if older else "")
        + f": install nvidia-nvshmem-cu13>={built[0]}.{built[1]},<{built[0] + 1}, or rebuild "
        f"lplb_jax with the NVSHMEM that is here (pip install --no-build-isolation .)"
    )


def _uses_ibgda() -> bool:
    return os.environ.get("NVSHMEM_IB_ENABLE_IBGDA", "0")[:1] not in ("", "0", "n", "N", "f", "F")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def host_version() -> Version:
    """The version of the library that `missing` has found."""
    parts = [ctypes.c_int() for _ in range(3)]
    _loaded().nvshmemx_vendor_get_version_info(*map(ctypes.byref, parts))
    major, minor, patch = (part.value for part in parts)
    return major, minor, patch


def built_version(put: pathlib.Path) -> Version:
    """The device library's version, which cmake/nvshmem.cmake puts into the file's name."""
    major, minor, patch = re.findall(r"\d+", put.name)
    return int(major), int(minor), int(patch)


def _put_file() -> pathlib.Path | None:
    files = (pathlib.Path(str(file)) for file in importlib.resources.files("lplb_jax").iterdir())
    return next((file for file in files if file.name.startswith("put-")), None)


class Job:
    """The processes that share NVSHMEM's symmetric heap; `pe` is this one's number."""

    def __init__(self, ordinal: int):
        self._ordinal = ordinal
        self.pe = _loaded().nvshmem_my_pe()

    def allocate(self, n_bytes: int) -> int:
        """Allocates zeroed memory on every process's heap; all processes must call it."""
        address = _loaded().nvshmem_malloc(n_bytes)
        if not address:
            raise MemoryError(
                f"init_comm: NVSHMEM has no {n_bytes} bytes left; raise NVSHMEM_SYMMETRIC_SIZE"
            )
        _native.built_cuda().comm_clear(self._ordinal, address, n_bytes)
        return address

    @functools.cached_property
    def put_library(self) -> int:
        """Loads the kernels that use put with signal; raises RuntimeError if that fails."""
        reason = missing_put()
        if reason is not None:
            raise RuntimeError(reason)
        library = _native.built_cuda().comm_load_library(self._ordinal, str(_put_file()))
        error = _loaded().nvshmemx_culibrary_init(ctypes.c_void_p(library))
        if error:
            raise RuntimeError(
                f"NVSHMEM {_dotted(host_version())} cannot use {_put_file()} (error {error}); "
                f"NVSHMEM_DEBUG=INFO says more"
            )
        return library

    def free(self, address: int) -> None:
        """Frees symmetric memory; all processes must call it."""
        _loaded().nvshmem_free(address)

    def pointer(self, address: int, pe: int) -> int:
        """The address at which this GPU reaches another's memory; 0 if it cannot."""
        return _loaded().nvshmem_ptr(address, pe) or 0


@functools.cache
def _job(ordinal: int) -> Job:
    return Job(ordinal)


def join(ordinal: int, rendezvous: Rendezvous) -> Job:
    """Initializes NVSHMEM on the current GPU, `ordinal`, for these processes, or reuses it."""
    library = _loaded()
    status = library.nvshmemx_init_status()
    n_processes = len(rendezvous.processes)
    states = {int(state) for state in rendezvous.exchange("status", str(status))}
    if min(states) >= _READY:
        if library.nvshmem_n_pes() != n_processes:
            raise RuntimeError(
                f"NVSHMEM was initialised for {library.nvshmem_n_pes()} processes, and the mesh "
                f"has {n_processes}"
            )
        return _job(ordinal)
    if states != {0}:
        raise RuntimeError("NVSHMEM is initialised in some processes, or only half")
    # Neither NVLink multicast, which can block the GPUs of a host, nor NCCL is needed. The default
    # heap granularity, 512 MiB, is far more than the inboxes need.
    os.environ["NVSHMEM_DISABLE_NVLS"] = "1"
    os.environ.setdefault("NVSHMEM_DISABLE_NCCL", "1")
    os.environ.setdefault("NVSHMEM_CUMEM_GRANULARITY", str(2 << 20))
    if len(set(rendezvous.exchange("host", os.uname().nodename))) == 1:
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    unique_id = _UniqueId(version=_version(_UniqueId))
    rank = rendezvous.rank
    got = rank == 0 and library.nvshmemx_get_uniqueid(ctypes.byref(unique_id)) == 0
    sent = rendezvous.exchange("unique id", bytes(unique_id).hex() if got else "")[0]
    if not sent:
        raise RuntimeError("NVSHMEM gave no unique id")
    unique_id = _UniqueId.from_buffer_copy(bytes.fromhex(sent))
    attributes = _InitAttributes(
        version=_version(_InitAttributes),
        args=_InitArgs(
            version=_version(_InitArgs),
            unique_id=_UniqueIdArgs(version=_version(_UniqueIdArgs)),
        ),
    )
    library.nvshmemx_set_attr_uniqueid_args(
        rank, n_processes, ctypes.byref(unique_id), ctypes.byref(attributes)
    )
    failed = library.nvshmemx_hostlib_init_attr(_INIT_WITH_UNIQUE_ID, ctypes.byref(attributes))
    # If it finds no GPU it returns 0, and any further call would abort the process.
    if failed or library.nvshmemx_init_status() < _READY:
        raise RuntimeError(
            f"NVSHMEM could not be initialised (error {failed}); NVSHMEM_DEBUG=INFO says more"
        )
    return _job(ordinal)
