"""The packages and versions that a build requires from pip."""

import itertools
import pathlib
import re
import tomllib

import pytest

build = pytest.importorskip("scikit_build_core.build")

PROJECT = pathlib.Path(__file__).parent.parent
TOOLKIT = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]"
# Values of each variable, and the packages that only PyPI provides if it is set.
NEEDS = {
    "LPLB_CUDA": {"auto": [], "on": [], "off": [], "pypi": [TOOLKIT]},
    "LPLB_MATHDX": {"off": [], "on": ["nvidia-libmathdx-cu13", "nvidia-cuda-nvrtc"]},
    "LPLB_NVSHMEM": {"auto": [], "off": [], "on": ["nvidia-nvshmem-cu13"]},
}


def requirements(monkeypatch, **options):
    """The requirements of a build with these variables."""
    monkeypatch.chdir(PROJECT)
    for name in NEEDS:
        monkeypatch.delenv(name, raising=False)
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    return build.get_requires_for_build_wheel()


def packages(requirements):
    return {re.split("[=<>~!]", one)[0] for one in requirements}


@pytest.mark.parametrize("values", list(itertools.product(*NEEDS.values())), ids="-".join)
def test_every_combination_asks_for_all_it_needs(monkeypatch, values):
    """Also where several overrides match; and for nothing else."""
    options = dict(zip(NEEDS, values, strict=True))
    needed = itertools.chain(*(NEEDS[name][value] for name, value in options.items()))
    always = packages(requirements(monkeypatch))
    assert packages(requirements(monkeypatch, **options)) == always | set(needed)


def versions(requirements, package):
    """What the requirements say about a package's version."""
    (wanted,) = [one for one in requirements if re.split("[=<>~!]", one)[0] == package]
    return wanted.removeprefix(package).split(",")


def test_built_with_the_oldest_versions_it_runs_with(monkeypatch):
    """Newer versions run code compiled for these, but not vice versa."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    (jaxlib,) = versions(settings["build-system"]["requires"], "jaxlib")
    assert jaxlib.replace("==", ">=") in versions(settings["project"]["dependencies"], "jax")
    with_nvshmem = requirements(monkeypatch, LPLB_NVSHMEM="on")
    (nvshmem,) = versions(with_nvshmem, "nvidia-nvshmem-cu13")
    extra = settings["project"]["optional-dependencies"]["nvshmem"]
    assert versions(extra, "nvidia-nvshmem-cu13") == [nvshmem.replace("==", ">="), "<4"]


def test_pre_commit_has_the_versions_that_lint_has():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    pinned = [one for one in settings["dependency-groups"]["dev"] if "==" in one]
    hooks = (PROJECT / ".pre-commit-config.yaml").read_text()
    for package in ("ruff", "clang-format"):
        versions = set(re.findall(rf"\[({package}==[\d.]+)\]", hooks))
        assert versions == {one for one in pinned if one.startswith(f"{package}==")}
