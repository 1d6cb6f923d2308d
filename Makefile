# On Debian or Ubuntu: Python 3.11 or newer, a C++ compiler and make are enough to start.
#   PYTHON=python3.12     which Python (default: python3)
#   LPLB_CUDA=off         the CUDA module: auto (where nvcc is found), on, off, or pypi, which takes
#                         the CUDA toolchain from PyPI and needs nothing of the system's
#   LPLB_NVSHMEM=on       with NVSHMEM's put, for GPUs that cannot map each other's memory
#   INSTALL=off           gpu-*: with the lplb_jax that $(PYTHON) imports; nothing is built
#   PYTEST="-n 4"         options of gpu-test, here four workers
#   TOOLS=memcheck        which of compute-sanitizer's tools gpu-sanitize runs (default: all four)
#   LPLB_MATHDX=on        with cuSolverDx's factor, for benchmarks
.DEFAULT_GOAL := help
.PHONY: help demo train training-picture test lint format docs gpu-test gpu-sanitize gpu-benchmark \
  on-gpu-test on-gpu-sanitize on-gpu-benchmark wheel clean
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
ifneq ($(INSTALL),off)
  GPU_PACKAGE = $(GPU_SITE)/installed
  GPU_PATH = PYTHONPATH=$(GPU_SITE)$${PYTHONPATH:+:$$PYTHONPATH}
endif
TOOLS ?= memcheck racecheck initcheck synccheck
# As benchmarks/results names it: h100, h200.
CARD = $(shell nvidia-smi --query-gpu=name --format=csv,noheader \
  | sed -n '1 s/NVIDIA \([^ ]*\).*/\L\1/p')
NEW = build/benchmarks

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

# The committed one is of virtual devices on two cores, which took ten minutes.
training-picture: $(INSTALLED)  ## train it with every kind of balance, and draw docs/images/training.svg
	$(BIN)/python benchmarks/training.py --every 4 --json benchmarks/results/training_cpu8.json -- \
	  --steps 160 --context 64 --layers 1 --hidden 64 --width 64 --capacity-factor 8
	$(BIN)/python docs/figures.py

test: lint $(INSTALLED)  ## lint, and every test that needs no GPU
	$(BIN)/pytest -n auto

lint: $(DEPENDENCIES)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(DEPENDENCIES)  ## rewrite the sources in that style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

gpu-test:  ## the GPU's tests, with the Python packages already there
gpu-sanitize:  ## compute-sanitizer over every kernel
gpu-benchmark:  ## the benchmarks, and whether anything got slower
gpu-test gpu-sanitize gpu-benchmark:
	@if nvidia-smi --list-gpus >/dev/null 2>&1; then $(MAKE) --no-print-directory on-$@; \
	  else echo "lplb_jax: no NVIDIA GPU here: nothing to do for $@"; fi

# Safe path: not the lplb_jax of the checkout, which lacks the native modules.
on-gpu-test: $(GPU_PACKAGE)
	PYTHONSAFEPATH=1 $(GPU_PATH) $(PYTHON) -m pytest -m gpu $(PYTEST)

# Without XLA's autotuning, which compares buffers whose padding nothing has written.
on-gpu-sanitize: $(GPU_PACKAGE)
	for tool in $(TOOLS); do \
	  XLA_FLAGS="$$XLA_FLAGS --xla_gpu_autotune_level=0" PYTHONSAFEPATH=1 $(GPU_PATH) \
	    xargs -d '\n' -a tests/sanitized.txt compute-sanitizer --error-exitcode 1 --tool $$tool \
	    $(PYTHON) -m pytest -m gpu -p no:cacheprovider || exit 1; done

# Figures without a committed file of this card are measured and kept, but compared with nothing.
on-gpu-benchmark: $(GPU_PACKAGE)
	rm -rf $(NEW) && mkdir -p $(NEW)
	set -e; card=$(CARD); run() { \
	  echo "benchmarks/$$*"; $(GPU_PATH) $(PYTHON) benchmarks/"$$@"; }; \
	run balancer.py --json $(NEW)/balancer_$$card.json; \
	run solver.py --json $(NEW)/solver_$$card.json; \
	run any_placement.py --instances 20 --json $(NEW)/any_placement_$$card.json; \
	if [ "$$(nvidia-smi --list-gpus | wc -l)" -ge 2 ]; then \
	  export CUDA_VISIBLE_DEVICES=0,1; \
	  run load_sync.py --json $(NEW)/load_sync_p2p_$${card}x2.json; \
	  run exchange.py --json $(NEW)/exchange_$${card}x2.json; \
	  run moe_layer.py --hidden 4096 --width 1536 --repeats 3 \
	    --json $(NEW)/moe_layer_4096_$${card}x2.json; fi
	$(PYTHON) benchmarks/compare.py benchmarks/results $(NEW)

docs: $(VENV)/docs  ## the documentation's site, in build/site/; any warning is an error
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/wheel  ## a wheel to give away, in dist/, audited and tested in an environment of its own
	rm -rf build/wheel
	$(PIP) wheel -v --no-deps -w build/wheel --config-settings=build-dir= .
	PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --wheel-dir dist build/wheel/*.whl
	.ci/test-wheel $(BIN)/python newest dist/*-$$(basename build/wheel/*.whl | cut -d- -f3,4)-*.whl

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

$(VENV)/docs $(VENV)/wheel: pyproject.toml | $(BIN)/python
	$(PIP) install --upgrade pip # the one of Python 3.11 knows no groups
	$(PIP) install --group $(@F)
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
