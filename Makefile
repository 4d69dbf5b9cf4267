# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that a machine decides once which torch build it gets.
TORCH ?= torch==2.13.0
# Further requirements, for example PINS="transformers==5.16.0".
PINS ?=
JOBS ?= 2
# Further arguments of pytest, for example TESTS="tests/test_cli.py".
TESTS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SETTINGS := pyproject.toml setup.cfg

.PHONY: demo test lint types clean

demo: $(VENV)/installed
	$(BIN)/cmoe demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SETTINGS)
	$(PIP) --editable . $(PINS)
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SETTINGS)
	$(PIP) --editable '.[dev]' $(PINS)
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info
