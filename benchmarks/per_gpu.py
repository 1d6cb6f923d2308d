"""A benchmark that runs as one process per GPU."""

from __future__ import annotations

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
        n = n_gpus
        if n is None:
            n = subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).count("GPU ")
        places = [{**os.environ, _PLACE: f"{address} {n} {i}"} for i in range(n)]
        command = [sys.executable, *sys.argv]
        started = [subprocess.Popen(command, env=environment) for environment in places]
        sys.exit(max(abs(process.wait()) for process in started))
    address, n, i = place.split()
    jax.distributed.initialize(address, int(n), int(i), local_device_ids=[int(i)])
    if int(i) > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 — until the process ends
