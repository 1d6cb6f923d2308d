"""One of several processes that agree on how to share loads, without a GPU.

python comm_process.py COORDINATOR N_PROCESSES PROCESS SCENARIO
"""

import sys
import time
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import lplb_jax.comm
from lplb_jax import init_comm
from lplb_jax._rendezvous import Rendezvous


def agreement(process: int, processes: list[int]) -> None:
    """Everybody sees everybody's word, in order, and the first reason not to go on."""
    rendezvous = Rendezvous("test", processes, timeout_s=30)
    assert rendezvous.rank == process
    assert rendezvous.exchange("square", str(process**2)) == [str(p**2) for p in processes]
    assert rendezvous.first_reason(None) is None
    last = processes[-1]
    reason = rendezvous.first_reason("it rains" if process == last else None)
    assert reason == f"it rains (process {last})", reason


def init(process: int, processes: list[int]) -> None:
    """One process cannot: all fall back or raise, for the same reason."""
    mesh = Mesh(np.array(jax.devices()), "ep")
    assert init_comm(mesh, max_experts=8).transport == "xla"
    lplb_jax.comm._on_gpus = lambda groups: True  # What follows finds no CUDA or no NVSHMEM.
    lplb_jax.comm._probe_nvshmem = lambda groups: "its NVSHMEM is broken" if process == 1 else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comm = init_comm(mesh, max_experts=8)
    assert comm.transport == "xla"
    assert comm.size == len(processes)
    (warning,) = [str(w.message) for w in caught if "lax.all_gather" in str(w.message)]
    assert "its NVSHMEM is broken (process 1)" in warning
    message = r"'nvshmem' cannot be had: its NVSHMEM is broken \(process 1\)"
    with pytest.raises(RuntimeError, match=message):
        init_comm(mesh, max_experts=8, transport="nvshmem")


def late(process: int, processes: list[int]) -> None:
    """A process does not come: the others say which, within their timeout."""
    mesh = Mesh(np.array(jax.devices()), "ep")
    lplb_jax.comm._on_gpus = lambda groups: True
    if process == 1:
        time.sleep(6)
        return
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"process 1 did not come .*within 2 s"):
        init_comm(mesh, max_experts=8, timeout_s=2)
    assert time.perf_counter() - start < 5


def main() -> None:
    coordinator, n_processes, process, scenario = sys.argv[1:]
    process, n_processes = int(process), int(n_processes)
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(coordinator, n_processes, process)
    {"agreement": agreement, "init": init, "late": late}[scenario](
        process, list(range(n_processes))
    )
    print("done")


if __name__ == "__main__":
    main()
