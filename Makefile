# `make demo` and `make test` set up everything they need: Linux and Python 3.11 or newer are enough.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint types unit format bench clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := plots,examples,xla,export,dev

# torch_xla has wheels for Python 3.11 to 3.13, so these come first; `make PYTHON=... test` overrides the choice.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& command -v "$$python" && break; done)

WORKERS ?= auto
# The report reads what the others wrote.
BENCHMARKS ?= $(filter-out benchmarks/report.py,$(sort $(wildcard benchmarks/*.py))) $(wildcard benchmarks/report.py)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## convert, train and prune a small network (minutes, CPU only)
	$(BIN)/python examples/coded.py

test: lint types unit  ## all checks: style, types, tests

lint: $(INSTALLED)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## types
	$(BIN)/mypy

unit: $(INSTALLED)  ## tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4

format: $(INSTALLED)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## run every benchmark, then the report
	for benchmark in $(BENCHMARKS); do echo "$$benchmark"; $(BIN)/python "$$benchmark"; done

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The extra `xla` holds torch and torchvision at the releases that torch_xla was built for, so one resolution must see all.
$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[$(EXTRAS)]'
	touch $@

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: found no Python >= 3.11 with venv and ensurepip; install one (Debian: python3 and python3-venv)," \
			"or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)
