# make demo   trains a private diffusion model on handwritten digits and opens the way to its report
# make test   formatting, lint, types and every test
# make trust  what the tests try a slice of, in full, and attacks: some hours; docs/guarantee.md has what came out
# make docs   documentation as a site, in docs/_build
# make gpu    tests, ops and steps on a GPU, with what is installed there (benchmarks/README.md)
# The first two create .venv by themselves and need only python3 (3.11 or newer, with venv); a C++ compiler is used when
# there.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
# Compiling all 10,000 files costs a minute or more; Python compiles what is imported, and keeps it unless told not to.
export PYTHONDONTWRITEBYTECODE :=
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp)

# One number of threads for everything: two processes with two threads each on two cores fight over them.
JOBS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Of a machine with a GPU, which may be offline: nothing is installed. GPU_PYTHON: one that has torch. OUT: a folder for
# results. ONLY: a part of the names of rows. MINUTES: after which a part begins nothing more. DRY=1: tried on the CPU.
GPU_PYTHON ?= python3
GPU_PACKAGE := build/gpu
GPU_ENV := PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH="$(CURDIR)/$(GPU_PACKAGE):$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
GPU_OPTIONS = $(if $(ONLY),--only '$(ONLY)') $(if $(OUT),--out '$(OUT)') $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY),--dry)
GPU_PARTS := gpu-tests gpu-kernels gpu-launches gpu-step gpu-page

.PHONY: demo test trust docs lint format typecheck pytest clean gpu gpu-package $(GPU_PARTS)

demo: $(VENV)/.demo
	$(BIN)/dpfast demo

test: lint typecheck pytest

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(VENV)/.test
	$(BIN)/python tools/typecheck.py

pytest: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

trust: $(VENV)/.test
	DPFAST_TRUST=1 $(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(wildcard tests/test_trust_*.py)
	$(TEST_ENV) $(BIN)/python -m benchmarks.audits
	$(TEST_ENV) $(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.trust

docs: $(VENV)/.test
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

gpu: gpu-package
	$(GPU_ENV) $(GPU_PYTHON) -m benchmarks.gpu all $(GPU_OPTIONS)

$(GPU_PARTS): gpu-package
	$(GPU_ENV) $(GPU_PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(GPU_OPTIONS)

gpu-package:
	@$(GPU_PYTHON) tools/gpu_package.py $(GPU_PACKAGE)

format: $(VENV)/.test
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# An environment is made again when anything that it was made from changes.
$(VENV)/.torch: constraints.txt tools/install_torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dpfast needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing. Install it (Debian, Ubuntu: apt install python3-venv) and try again."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	tools/install_torch.sh $(BIN)/python
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) .typecheck build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
