"""A benchmark that runs as one process per GPU."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys

import jax

_PLACE = "LPLB_BENCHMARK_PLACE"  # coordinator, number of processes, and index of this one


def one_per_gpu(n_gpus: int | None = None) -> None:
    """Returns in each of `n_gpus` processes (default: one per GPU), with JAX initialized.

    It does not return in the parent process, which starts the others and exits when they end.
    """
    place = os.environ.get(_PLACE)
    if place is None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        n = visible_gpus() if n_gpus is None else n_gpus
        if n < 1:
            sys.exit("processes: expected one GPU or more, got none; see CUDA_VISIBLE_DEVICES")
        places = [{**os.environ, _PLACE: f"{address} {n} {i}"} for i in range(n)]
        command = [sys.executable, *sys.argv]
        started = [subprocess.Popen(command, env=environment) for environment in places]
        sys.exit(max(abs(process.wait()) for process in started))
    address, n, i = place.split()
    jax.distributed.initialize(address, int(n), int(i), local_device_ids=[int(i)])
    if int(i) > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 — until the process ends


def visible_gpus() -> int:
    """The number of GPUs that a process would see; JAX must not start in this one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA ignores what follows an entry that names no GPU.
        named = itertools.takewhile(lambda name: name.strip() not in ("", "-1"), chosen.split(","))
        return len(list(named))
    return subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).count("GPU ")
