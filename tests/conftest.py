"""Fixtures: random numbers with a fresh seed, shown on failure, and eight virtual CPU devices."""

import glob
import importlib.util
import os
import secrets
import zlib

import hypothesis
import jax
import numpy as np
import pytest


def gpus_in_turn(worker: str, gpus: list[str]) -> str:
    """What CUDA shows to a worker, "gw0", "gw1", …: all GPUs, and each of them first in turn."""
    first = int(worker.removeprefix("gw")) % len(gpus)
    return ",".join(gpus[first:] + gpus[:first])


# Before any backend starts. Workers of pytest-xdist share the GPUs: the first one would take three
# quarters of the memory, and tests of one GPU would all use the same.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    n_gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    numbers = ",".join(map(str, range(n_gpus)))
    if gpus := os.environ.get("CUDA_VISIBLE_DEVICES", numbers):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus_in_turn(worker, gpus.split(","))
# Tests that need no particular device run on JAX's default one.
jax.config.update("jax_num_cpu_devices", 8)

_CHECKED = importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype")
if _CHECKED:
    from jaxtyping import install_import_hook

    # Before lplb_jax is imported: shapes in the specification's signatures are only checked here.
    install_import_hook("lplb_jax.reference", "beartype.beartype")

# No database, which would leave files behind; no deadline, since compilation slows single examples.
hypothesis.settings.register_profile("lplb", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("lplb")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="seed of the random tests (default: a new one)")


def pytest_configure(config):
    # Options are passed on to the workers of pytest-xdist.
    if config.option.seed is None:
        config.option.seed = secrets.randbits(32)


def pytest_report_header(config):
    checked = "checked" if _CHECKED else "not checked: jaxtyping or beartype is not installed"
    return [f"seed: {config.option.seed}", f"shapes in lplb_jax.reference: {checked}"]


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that depend only on the seed and the test's name."""
    seed = request.config.option.seed
    request.node.add_report_section("call", "seed", f"to repeat: --seed={seed}")
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def cpu_devices() -> np.ndarray:
    """The eight virtual devices, also on a machine with GPUs."""
    return np.array(jax.devices("cpu")[:8])


@pytest.fixture
def two_gpus() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
