# make demo    compress a real language model, save, load and generate      (creates .venv on the first call)
# make test    all tests that need no GPU
# make lint    ruff, format check, mypy
# make kernels compile every kernel configuration for every supported architecture; fails on register spills
# make gpu     on a GPU host: GPU tests and benchmarks with the system's Python, no .venv and no network
# make sanitize  on a GPU host: compute-sanitizer (memcheck, racecheck, synccheck) over a reduced set of kernels
# make bench-report  render the tables of README and docs from benchmarks/records; make report-check compares only
# make clean   remove .venv, caches and build output
#
# PYTHON  interpreter that .venv is made from, and that `make gpu` runs (3.10 or newer).
# TORCH   what pip installs first. Where nvidia-smi exists, plain `torch`. Elsewhere a pinned release; choose another
#         with e.g. `make demo TORCH=torch`, or a CPU-only build with `make demo TORCH='torch --index-url <CPU index>'`.
# PYTEST_ARGS   added to the test run, e.g. `make test PYTEST_ARGS='-k layouts'`.

comma := ,
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= $(if $(HAS_GPU),torch,torch==2.13.0)
DEMO_EXTRAS := $(if $(HAS_GPU),$(comma)cuda)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
DOCUMENTS := README.md $(sort $(wildcard docs/*.md))

.DELETE_ON_ERROR:
.PHONY: help demo test lint kernels gpu sanitize bench-report report-check clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,/^$$/p'

# Stamps: a second call installs nothing; a changed pyproject.toml installs again.
$(VENV)/.torch:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "installing sparse-marlin with what the demo needs"
	@$(PIP) install -e '.[demo$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "installing sparse-marlin with what the tests need"
	@$(PIP) install -e '.[dev,demo]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@$(BIN)/marlin demo $(DEMO_ARGS)

# Why one thread: as many workers as cores, each with as many threads, would fight over the cores.
test: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(TEST_WORKERS) --timeout 300 -q $(PYTEST_ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

kernels: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.kernels --archs "$$($(BIN)/python -c 'from marlin.runtime.source import ARCHS; print(*ARCHS, sep=",")')"

gpu:
	@PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu

sanitize:
	@PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) tests/gpu/sanitize.py

bench-report: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.report --update $(DOCUMENTS)

report-check: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.report --check $(DOCUMENTS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
