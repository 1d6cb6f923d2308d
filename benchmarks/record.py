"""Writes a benchmark's figures, together with the conditions of the run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

import jax

_OF_GPU = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def write(path: str, figures: dict[str, Any]) -> None:
    """Writes the figures as JSON, with the result of `run` under "run"."""
    with open(path, "w") as file:
        json.dump(figures | {"run": run()}, file, indent=1)
        file.write("\n")


def run() -> dict[str, Any]:
    """Command, commit, versions and machine; clocks are read at the end of the run.

    The environment variable COMMIT names the commit, if set, as for a copy of the sources.
    """
    smi = _output("nvidia-smi", f"--query-gpu={','.join(_OF_GPU)}", "--format=csv,noheader")
    gpus = [dict(zip(_OF_GPU, line.split(", "), strict=True)) for line in smi.splitlines()]
    cuda = re.search(r"CUDA Version: (\S+)", _output("nvidia-smi"))
    here = pathlib.Path(__file__).parent
    return {
        "command": " ".join([pathlib.Path(sys.argv[0]).name, *map(_portable, sys.argv[1:])]),
        "commit": os.environ.get("COMMIT")
        or _output("git", "-C", str(here), "describe", "--always", "--dirty").strip()
        or "not recorded",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "nccl": _version("nvidia-nccl-cu13"),
        "cuda_runtime": _version("nvidia-cuda-runtime"),
        "cuda_of_driver": cuda[1] if cuda else "no driver",
        "gpus": gpus,
        "cpu": _cpu(),
    }


def _portable(argument: str) -> str:
    """Keeps only the last part of an absolute path, which other machines do not have."""
    flag, equals, value = argument.rpartition("=")
    path = pathlib.PurePath(value)
    return flag + equals + (path.name if path.is_absolute() else value)


def _output(*command: str) -> str:
    """The output of a command; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()
