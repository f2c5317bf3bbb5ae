# Everything happens in .venv; a target installs only when pyproject.toml or requirements.txt has changed.
PYTHON ?= python3
EXPERIMENTS ?= digits
NOTEBOOKS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -e

.PHONY: help demo test test-all lint smoke notebooks docs
help:  ## Shows this list.
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo
	@echo "  ARGS are passed on:  make demo ARGS='--total-steps 500'   make test ARGS='tests/losses -x'"
	@echo "  PYTHON picks the interpreter that .venv is made with:  make test PYTHON=python3.12"

demo: .venv/.demo-stamp  ## Trains on 8x8 digits and draws samples of every class: minutes on a laptop, no download.
	@$(BIN)/python -m experiments.digits $(ARGS)

test: .venv/.test-stamp  ## Runs the tests and the examples in the docstrings, the heavy ones left out.
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-all: test  ## Runs the heavy tests too: trainings, experiments from end to end.
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup -m slow $(ARGS)

lint: .venv/.dev-stamp  ## Checks style, formatting and types.
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

smoke: .venv/.demo-stamp  ## Runs experiments from end to end with next to no computation: EXPERIMENTS="digits mnist".
	@for name in $(EXPERIMENTS); do $(BIN)/python -m experiments.$$name --smoke $(ARGS) || exit 1; done

notebooks: .venv/.test-stamp  ## Executes the notebooks and stores their outputs: minutes. NOTEBOOKS="04 05" takes some.
	@$(BIN)/python -m notebooks $(NOTEBOOKS) $(ARGS)

docs: .venv/.dev-stamp  ## Builds the site into site/ and checks every public name, equation and link in it.
	@$(BIN)/python docs/build.py $(ARGS)

.venv/.python-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fm_jax needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@touch $@

# Each set of packages holds the one above it.
.venv/.demo-stamp: pyproject.toml requirements.txt | .venv/.python-stamp
	@echo "Installing what the experiments need ..."
	@$(INSTALL) ".[experiments]"
	@touch $@

.venv/.test-stamp: pyproject.toml requirements.txt | .venv/.python-stamp
	@echo "Installing what the tests need ..."
	@$(INSTALL) ".[test]"
	@touch .venv/.demo-stamp $@

.venv/.dev-stamp: pyproject.toml requirements.txt | .venv/.python-stamp
	@echo "Installing the development tools ..."
	@$(INSTALL) ".[dev]"
	@touch .venv/.demo-stamp .venv/.test-stamp $@
