# Two commands do everything:  make demo   make test
# Both make .venv and install into it first; run again, they only do what is new.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all attack lint gpu clean

demo: $(VENV)/.installed  ## Train the Adaptive Sparse Transformer on generated questions, from scratch
	$(BIN)/astbench fit --attention=ast --task=triviaqa
	@echo "astbench is in $(VENV); to type it as a command:  source $(BIN)/activate"

# One worker a core and one torch thread a worker; at most eight, for each takes about 1.5 GB.  make test JOBS=1: one.
JOBS   ?= $(shell $(BIN)/python -c 'import os; print(min(8, len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))))')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(VENV)/.installed-dev  ## Style, types, import rules and the fast tests
	$(PYTEST) -n $(JOBS) --dist=worksteal

test-all: $(VENV)/.installed-dev  ## The slow tests too
	$(PYTEST) -n $(JOBS) --dist=worksteal -m "not gpu"

# Random trials from a seed, on this machine alone.  make attack ATTACK="--seconds=60 --only=A,C --seed=2"
ATTACK ?= --seconds=600

attack: $(VENV)/.installed-dev  ## Ten minutes of damage, kills, bombs and odd numbers: what must hold whatever happens
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ATTACK)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a CUDA device, in ten minutes: the Triton kernels compiled instead of interpreted, the GPU benches, a summary.
#   make gpu                  in .venv, as make test
#   make gpu SYSTEM=1         with what $(PYTHON) has: torch, triton, PyYAML, matplotlib, pytest; no network, no .venv
#   make gpu WHEELS=folder    the same, and with every wheel of that folder
#   OUT=folder, BUDGET=seconds: where records and summary go, how long all of it may take
OUT    ?= results/gpu
BUDGET ?= 570
WHEEL_SITE := build/wheels

gpu: $(if $(WHEELS),$(WHEEL_SITE),$(if $(SYSTEM),,$(VENV)/.installed-dev))  ## On a CUDA device: tests, benches, summary
	PYTHONPATH=$(CURDIR):$(CURDIR)/registry:$(CURDIR)/kernels$(if $(WHEELS),:$(CURDIR)/$(WHEEL_SITE))$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(if $(WHEELS)$(SYSTEM),$(PYTHON),$(BIN)/python) -m astbench.bench.gpu --out=$(OUT) --budget=$(BUDGET)

$(WHEEL_SITE): $(wildcard $(WHEELS)/*.whl)
	@rm -rf $@
	$(PYTHON) -m pip install --quiet --no-index --find-links=$(WHEELS) --no-deps --target=$@ $(WHEELS)/*.whl
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "astbench needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no virtual environment could be made; on Debian/Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
