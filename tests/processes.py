"""Programs of several processes that find one another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run(n: int, file: str, *arguments: str, **environment: str) -> list[str]:
    """Outputs of `python file COORDINATOR n i *arguments` for every process i; all must exit 0."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # -P: not the source tree, which has no native modules; what tests import is beside this file.
    path = [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", file, address, str(n), str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(n)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
