# On Debian or Ubuntu: Python 3.11 or newer, a C++ compiler and make are enough to start.
#   PYTHON=python3.12     which Python (default: python3)
#   LPLB_CUDA=off         the CUDA module: auto (where nvcc is found), on, off, or pypi, which takes
#                         the CUDA toolchain from PyPI and needs nothing of the system's
#   LPLB_NVSHMEM=on       with NVSHMEM's put, for GPUs that cannot map each other's memory
#   PYTEST="-n 4"         options of gpu-test, here four workers
#   LPLB_MATHDX=on        with cuSolverDx's factor, for benchmarks
.DEFAULT_GOAL := help
.PHONY: help demo train test lint format docs gpu-test gpu-sanitize gpu-benchmark wheel clean
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
BESIDE = PYTHONPATH=$(GPU_SITE):$$PYTHONPATH
ON_GPU = PYTHONSAFEPATH=1 $(BESIDE)
# Tests that launch every kernel once or a few times; under a sanitizer they take minutes.
SANITIZED = tests/test_gpu.py tests/test_gpu_any.py

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

lint: $(DEPENDENCIES)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(DEPENDENCIES)  ## rewrite the sources in that style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

gpu-test: $(GPU_SITE)/installed  ## the GPU's tests, with the Python packages already there
	$(ON_GPU) $(PYTHON) -m pytest -m gpu $(PYTEST)

# Needs CUDA's compute-sanitizer; the figures are compared with the committed ones of an H200.
gpu-sanitize: $(GPU_SITE)/installed  ## compute-sanitizer over the kernels
	for tool in memcheck racecheck initcheck synccheck; do \
	  $(ON_GPU) compute-sanitizer --error-exitcode 1 --tool $$tool \
	    $(PYTHON) -m pytest -m gpu -p no:cacheprovider $(SANITIZED) || exit 1; done

gpu-benchmark: $(GPU_SITE)/installed  ## the benchmarks, and whether anything got slower
	mkdir -p build/benchmarks
	$(BESIDE) $(PYTHON) benchmarks/balancer.py --json build/benchmarks/balancer_h200.json
	$(BESIDE) $(PYTHON) benchmarks/solver.py --json build/benchmarks/solver_h200.json
	if [ "$$(nvidia-smi --list-gpus | wc -l)" -ge 2 ]; then \
	  $(BESIDE) $(PYTHON) benchmarks/load_sync.py --gpus 2 \
	    --json build/benchmarks/load_sync_p2p_h200x2.json && \
	  CUDA_VISIBLE_DEVICES=0,1 $(BESIDE) $(PYTHON) benchmarks/moe_layer.py --hidden 4096 --width 1536 \
	    --repeats 6 --json build/benchmarks/moe_layer_4096_h200x2.json; fi
	for new in build/benchmarks/*.json; do echo "$$new"; \
	  $(PYTHON) benchmarks/compare.py benchmarks/results/$${new##*/} $$new || failed=1; done; \
	  exit $${failed:-0}

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
