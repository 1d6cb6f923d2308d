"""Runs programs of several processes that connect to one another."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

GRACE_S = 20.0  # for the others after one has failed


def run(
    n: int, file: str, *arguments: str, limit_s: float = 600.0, **environment: str
) -> list[str]:
    """Outputs of `python file COORDINATOR n i *arguments` for every process i; all must exit 0.

    Takes at most `limit_s`, and ends soon after a failure, which leaves no process running; the
    error then has all outputs.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # -P excludes the source tree, which has no native modules; test modules are beside this file.
    path = [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        # Files, since an unread pipe blocks its writer, and with it all processes that wait for it.
        logs = [pathlib.Path(folder) / f"{i}.log" for i in range(n)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", file, address, str(n), str(i), *arguments],
                env=environment,
                stdout=files.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(logs)
        ]
        try:
            codes = _exit_codes(processes, limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    told = [
        f"process {i}: {'no end' if code is None else f'exit code {code}'}\n{output}"
        for i, (code, output) in enumerate(zip(codes, outputs, strict=True))
    ]
    assert codes == [0] * n, "\n".join(told)
    return outputs


def _exit_codes(processes: list[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """Exit codes; None for processes that still run when time is up."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)
