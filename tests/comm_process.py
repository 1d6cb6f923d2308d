"""One of several processes that agree on how to exchange loads, without a GPU.

python comm_process.py COORDINATOR N_PROCESSES PROCESS SCENARIO
"""

import pathlib
import re
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import lplb_jax.comm
from lplb_jax import _native, _nvshmem, init_comm
from lplb_jax._rendezvous import Rendezvous

FOREVER = 1000.0  # seconds; the other processes arrive earlier even on a loaded machine


def agreement(process: int, processes: list[int]) -> None:
    """Every process sees all values in order, and the first reason not to continue."""
    rendezvous = Rendezvous("test", processes, timeout_s=FOREVER)
    assert rendezvous.rank == process
    assert rendezvous.exchange("square", str(process**2)) == [str(p**2) for p in processes]
    assert rendezvous.first_reason(None) is None
    last = processes[-1]
    reason = rendezvous.first_reason("it rains" if process == last else None)
    assert reason == f"it rains (process {last})", reason


def init(process: int, processes: list[int]) -> None:
    """If one process fails, all fall back or raise, for the same reason."""
    mesh = Mesh(np.array(jax.devices()), "ep")
    assert init_comm(mesh, max_experts=8).transport == "xla"
    lplb_jax.comm._on_gpus = lambda groups: True  # Later steps find no CUDA or no NVSHMEM.
    lplb_jax.comm._probe_nvshmem = lambda groups: "its NVSHMEM is broken" if process == 1 else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comm = init_comm(mesh, max_experts=8, timeout_s=FOREVER)
    assert comm.transport == "xla"
    assert comm.size == len(processes)
    (warning,) = [str(w.message) for w in caught if "lax.all_gather" in str(w.message)]
    assert "its NVSHMEM is broken (process 1)" in warning
    message = r"'nvshmem' is not available: its NVSHMEM is broken \(process 1\)"
    with pytest.raises(RuntimeError, match=message):
        init_comm(mesh, max_experts=8, transport="nvshmem", timeout_s=FOREVER)


def versions(process: int, processes: list[int]) -> None:
    """If one process's host library cannot run the put, none uses it, and its memory is freed."""
    library = Library((3, 4, 5) if process == 1 else (3, 8, 0))
    _nvshmem._library = lambda: library
    _nvshmem._put_file = lambda: pathlib.Path("put-nvshmem-3.6.5.fatbin")
    _nvshmem.join = lambda ordinal, rendezvous: _nvshmem.Job(ordinal)
    lplb_jax.comm._on_gpus = lambda groups: True
    _native.cuda = lambda: Native
    mesh = Mesh(np.array(jax.devices()), "ep")
    words = r"built with NVSHMEM 3\.6\.5, and the host library here is 3\.4\.5.* \(process 1\)$"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert init_comm(mesh, max_experts=8, timeout_s=FOREVER).transport == "xla"
    (warning,) = [str(w.message) for w in caught if "lax.all_gather" in str(w.message)]
    assert re.search(words, warning), warning
    for transport in ("nvshmem", "nvshmem_put"):
        with pytest.raises(RuntimeError, match=f"'{transport}' is not available: .*{words}"):
            init_comm(mesh, max_experts=8, transport=transport, timeout_s=FOREVER)
    assert library.allocations == library.frees == 3


def windows(process: int, processes: list[int]) -> None:
    """Where GPUs cannot map each other's memory, put reaches the windows, on the symmetric heap."""
    library, native = by_put()
    mesh = Mesh(np.array(jax.devices()), "ep")
    room = {"max_tokens": 100, "hidden_bytes": 500, "top_k": 4, "copy_bytes": 64}
    for number, transport in enumerate(("auto", "nvshmem", "nvshmem_put")):
        options: dict[str, Any] = {"transport": transport, "timeout_s": FOREVER, **room}
        with init_comm(mesh, max_experts=8, **options) as comm:
            assert comm.transport == "nvshmem_put"
            assert comm.window is not None
            assert comm.window.shape == [len(processes), 100, 4, 512]
            assert comm.copy_bytes == 0, "copy engines reach mapped memory only"
            assert comm.most_slots == 16
            assert not comm.fuses
            assert library.allocations == 2 * number + 2
            inbox, pes, window = native.attached.pop(comm.identifier)
            assert inbox != window
            assert pes == processes
    assert library.allocations == library.frees == 6
    assert not native.attached
    with init_comm(mesh, max_experts=8, transport="nvshmem_put", timeout_s=FOREVER) as comm:
        assert comm.window is None
        assert library.allocations == 7


def identifiers(process: int, processes: list[int]) -> None:
    """Communicators of some of the processes do not come in the way of those of all."""
    by_put()
    options: dict[str, Any] = {"max_experts": 8, "transport": "nvshmem_put", "timeout_s": FOREVER}
    own = Mesh(np.array(jax.local_devices()), "ep")
    made = [init_comm(own, **options) for _ in range(3 * process)]
    made += [init_comm(Mesh(np.array(jax.devices()), "ep"), **options) for _ in range(2)]
    used = [comm.identifier for comm in made]
    assert sorted(set(used)) == used
    check = Rendezvous("identifiers", processes, timeout_s=FOREVER)
    assert len(set(check.exchange("of all", str(used[-2:])))) == 1


def closing(process: int, processes: list[int]) -> None:
    """Memory is freed if all close, not after a failure anywhere; nobody waits for longer."""
    library, native = by_put()
    mesh = Mesh(np.array(jax.devices()), "ep")
    options: dict[str, Any] = {"max_experts": 8, "transport": "nvshmem_put"}
    for failing in (None, *processes):
        native.failure = "it rains" if process == failing else ""
        init_comm(mesh, timeout_s=FOREVER, **options).close()
        assert library.frees == 1, failing
    comm = init_comm(mesh, timeout_s=2, **options)
    if process != 1:
        start = time.perf_counter()
        with pytest.warns(UserWarning, match=r"not freed, since not every process .* within 2 s"):
            comm.close()
        assert time.perf_counter() - start < 30
    assert library.frees == 1
    assert native.detached == len(processes) + 1 + (process != 1)


def by_put() -> tuple["Library", "NativeOfPut"]:
    """As if there were GPUs of different hosts."""
    library = Library((3, 8, 0))
    native = NativeOfPut()
    _nvshmem._library = lambda: library
    _nvshmem._put_file = lambda: pathlib.Path("put-nvshmem-3.6.5.fatbin")
    _nvshmem.join = lambda ordinal, rendezvous: _nvshmem.Job(ordinal)
    lplb_jax.comm._on_gpus = lambda groups: True
    _native.cuda = lambda: native
    return library, native


class Library:
    """A stand-in for NVSHMEM's host library that cannot map other GPUs' memory."""

    def __init__(self, version: tuple[int, int, int]):
        self._version = version
        self.allocations = self.frees = 0

    def nvshmemx_vendor_get_version_info(self, *parts):
        for part, number in zip(parts, self._version, strict=True):
            part._obj.value = number

    def nvshmem_my_pe(self):
        return jax.process_index()

    def nvshmem_malloc(self, n_bytes):
        self.allocations += 1
        return 4096 * self.allocations

    def nvshmem_free(self, address):
        self.frees += 1

    def nvshmem_ptr(self, address, pe):
        return None

    def nvshmemx_culibrary_init(self, library):
        return 0


class Native:
    """A stand-in for the CUDA module, up to attaching a rank."""

    comm_inbox_bytes = staticmethod(lambda size, stride: 16 * size * stride)
    comm_clear = staticmethod(lambda ordinal, address, n_bytes: None)
    comm_load_library = staticmethod(lambda ordinal, file: 1)
    comm_use_device = staticmethod(lambda ordinal: None)
    comm_detach = staticmethod(lambda comm: None)


class NativeOfPut(Native):
    """The same for whatever init_comm and Comm use of it where peers are not mapped."""

    def __init__(self):
        self.attached: dict[int, tuple] = {}
        self.detached = 0
        self.failure = ""

    def comm_attach(self, comm, ordinal, rank, inboxes, stride, timeout_s):
        assert [inbox != 0 for inbox in inboxes] == [peer == rank for peer in range(len(inboxes))]

    def comm_attach_put(self, comm, ordinal, library, pes, inbox, staging, signals):
        self.attached[comm] = (inbox, pes)

    def comm_put_window_bytes(self, shape):
        return 4 * shape[1] * shape[3]

    def comm_attach_put_windows(self, comm, ordinal, library, window, shape):
        self.attached[comm] += (window,)

    def comm_failure(self, comm):
        return self.failure

    def comm_detach(self, comm):
        self.detached += 1


def late(process: int, processes: list[int]) -> None:
    """If a process does not come, the others name it within their timeout."""
    mesh = Mesh(np.array(jax.devices()), "ep")
    lplb_jax.comm._on_gpus = lambda groups: True
    if process != 1:
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"process 1 did not come .*within 2 s"):
            init_comm(mesh, max_experts=8, timeout_s=2)
        assert time.perf_counter() - start < 30, "not its own timeout, but the default"
    Rendezvous("all have seen it", processes, timeout_s=FOREVER).exchange("late", "")


def main() -> None:
    coordinator, n_processes, process, scenario = sys.argv[1:]
    process, n_processes = int(process), int(n_processes)
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(coordinator, n_processes, process)
    functions = (agreement, init, versions, windows, identifiers, closing, late)
    scenarios = {function.__name__: function for function in functions}
    scenarios[scenario](process, list(range(n_processes)))
    print("done")


if __name__ == "__main__":
    main()
