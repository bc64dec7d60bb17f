# Two commands do everything:  make demo   make test
# Both make .venv and install into it first; run again, they only do what is new.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint gpu clean

demo: $(VENV)/.installed  ## Train the Adaptive Sparse Transformer on generated questions, from scratch
	$(BIN)/astbench fit --attention=ast --task=triviaqa

test: $(VENV)/.installed-dev  ## Style, types, import rules and the fast tests
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev  ## The slow tests too
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu: $(VENV)/.installed-dev  ## On a CUDA device: the Triton kernels compiled instead of interpreted, and what needs a GPU
	$(BIN)/python -m pytest tests/kernels/test_triton.py
	$(BIN)/python -m pytest -m gpu

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
