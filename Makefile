# On Debian or Ubuntu: Python 3.11 or newer, a C++ compiler and make are enough to start.
#   PYTHON=python3.12     which Python (default: python3)
#   LPLB_CUDA=off         the CUDA module: auto (where nvcc is found), on, off, or pypi, which takes
#                         the CUDA toolchain from PyPI and needs nothing of the system's
#   LPLB_NVSHMEM=on       with NVSHMEM's put, for GPUs that cannot map each other's memory
#   LPLB_MATHDX=on        with cuSolverDx's factor, for benchmarks
.DEFAULT_GOAL := help
.PHONY: help demo train test lint format gpu-test wheel clean
.DELETE_ON_ERROR:

PYTHON ?= python3
LPLB_CUDA ?= auto
LPLB_MATHDX ?= off
LPLB_NVSHMEM ?= auto
export LPLB_CUDA LPLB_MATHDX LPLB_NVSHMEM

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
GPU_SITE := $(CURDIR)/build/gpu-site

C_FILES = $(shell find xla_ffi cuda -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
SOURCES = CMakeLists.txt pyproject.toml $(wildcard cmake/*) $(C_FILES) \
  $(shell find lplb_jax -type f -not -path '*/__pycache__/*')
OPTIONS := cuda-$(LPLB_CUDA)-mathdx-$(LPLB_MATHDX)-nvshmem-$(LPLB_NVSHMEM)
DEPENDENCIES := $(VENV)/dependencies-$(OPTIONS)
INSTALLED := $(VENV)/installed-$(OPTIONS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED)  ## build, install into .venv, and run the demonstration
	$(BIN)/lplb-jax demo

train: $(INSTALLED)  ## train a small mixture-of-experts model, some minutes
	$(BIN)/python examples/train_moe.py

test: lint $(INSTALLED)  ## lint, and every test that needs no GPU
	$(BIN)/pytest -n auto

lint: $(DEPENDENCIES)  ## check style of Python and C++
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(DEPENDENCIES)  ## rewrite the sources in that style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

gpu-test: $(GPU_SITE)/installed  ## the GPU's tests, with the Python packages already there
	PYTHONSAFEPATH=1 PYTHONPATH=$(GPU_SITE):$$PYTHONPATH $(PYTHON) -m pytest -m gpu

wheel: $(BIN)/python  ## a wheel to give away, in dist/
	$(PIP) wheel -v --no-deps -w dist --config-settings=build-dir= .

clean:  ## remove whatever make made
	rm -rf $(VENV) build dist

# Ends a check: where it fails, the message says what to install.
else_say = || { echo "lplb_jax: $(1)" >&2; exit 1; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  $(call else_say,Python 3.11 or newer is needed. Name one with: make PYTHON=python3.12)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  $(call else_say,Python has no venv. On Debian: sudo apt install python3-venv)
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
	  $(call else_say,Python has no headers. On Debian: sudo apt install python3-dev)
	@command -v $(CXX) >/dev/null \
	  $(call else_say,there is no C++ compiler. On Debian: sudo apt install g++)
	$(PYTHON) -m venv $(VENV)

# The build backend itself knows what else this machine lacks: CMake, ninja, the CUDA toolchain.
$(DEPENDENCIES): pyproject.toml | $(BIN)/python
	$(PIP) install --upgrade pip
	$(PIP) install --group dev
	$(BIN)/python -c 'from scikit_build_core.build import *; print(*get_requires_for_build_wheel())' \
	  | xargs --no-run-if-empty $(PIP) install
	$(PIP) install --no-build-isolation --only-deps '.[demo,test]'
	touch $@

# Editable: a change of the Python files counts at once, a change of the others at the next make.
$(INSTALLED): $(DEPENDENCIES) $(SOURCES)
	$(PIP) install -v --no-build-isolation --no-deps -e .
	rm -f $(VENV)/installed-*
	touch $@

$(GPU_SITE)/installed: $(SOURCES)
	LPLB_CUDA=on $(PYTHON) -m pip install -v --no-build-isolation --no-deps --upgrade \
	  --target $(GPU_SITE) .
	touch $@
