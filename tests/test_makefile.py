"""The Makefile on machines with and without GPUs; nvidia-smi and Python are stand-ins."""

import os
import pathlib
import shutil
import subprocess
import sys

import conftest
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TARGETS = ["gpu-test", "gpu-sanitize", "gpu-benchmark"]
SANITIZED = (ROOT / "tests" / "sanitized.txt").read_text().splitlines()

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(folder: pathlib.Path, target: str, programs: dict[str, str], *variables: str) -> str:
    """The output of `make target` with these programs first in PATH."""
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "-C", str(ROOT), target, f"NEW={folder}/new", *variables]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_gpu(tmp_path, target):
    """Nothing is built, nothing fails."""
    said = make(tmp_path, target, {"nvidia-smi": "exit 9", "python": "exit 1"}, "PYTHON=python")
    assert f"no NVIDIA GPU here: nothing to do for {target}" in said


@pytest.mark.parametrize("n_gpus", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_with_the_package_that_is_there(tmp_path, target, n_gpus):
    """INSTALL=off runs what the named Python imports."""
    smi = f"yes 'NVIDIA H100 80GB HBM3' | head -{n_gpus}"
    programs = {
        "nvidia-smi": smi,
        "python": 'echo "python: $@"',
        "compute-sanitizer": 'echo "compute-sanitizer: $@"',
    }
    options = "INSTALL=off", "PYTHON=python", "PYTEST=-n 8", "TOOLS=memcheck racecheck"
    said = make(tmp_path, target, programs, *options).splitlines()
    calls = [line for line in said if line.startswith(("python: ", "compute-sanitizer: "))]
    assert not any("pip" in call for call in calls)
    if target == "gpu-test":
        assert calls == ["python: -m pytest -m gpu -n 8"]
    elif target == "gpu-sanitize":
        assert [call.split(" --tool ")[1].split()[0] for call in calls] == ["memcheck", "racecheck"]
        assert all(call.endswith(" ".join(SANITIZED)) for call in calls)
    else:
        written = [call.split("new/")[1] for call in calls if "--json" in call]
        alone = ["balancer_h100.json", "solver_h100.json", "any_placement_h100.json"]
        together = ["load_sync_p2p_h100x2.json", "exchange_h100x2.json"]
        together.append("moe_layer_4096_h100x2.json")
        assert written == alone + together * (n_gpus == 2)
        assert calls[-1] == f"python: benchmarks/compare.py benchmarks/results {tmp_path}/new"


def test_the_sanitized_tests_exist():
    files = sorted({line.partition("::")[0] for line in SANITIZED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(SANITIZED) <= set(done.stdout.splitlines())


def test_workers_begin_with_different_gpus():
    """Each sees all of them."""
    seen = [conftest.gpus_in_turn(f"gw{k}", ["0", "5", "GPU-8"]) for k in range(4)]
    assert seen == ["0,5,GPU-8", "5,GPU-8,0", "GPU-8,0,5", "0,5,GPU-8"]
