# The commands of this repository. Everything is installed into .venv, from requirements.lock; nothing outside this
# folder changes.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(shell command -v $(name))))
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests that are sensitive to load run one after another, all others in several processes, each with its own store.
ALONE := ray or e2e or prompt
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help serve install test test-fast chaos mutants check format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(INSTALLED) ## install, make the demo models and start farebox; Ctrl-C stops it
	@$(BIN)/farebox up

install: $(INSTALLED) ## install into .venv from requirements.lock

test: $(INSTALLED) ## run all tests: most of them in parallel, then those that need the machine for themselves
	@status=0; \
	$(BIN)/python -m pytest $(PARALLEL) -m "not ($(ALONE))" || status=$$?; \
	$(BIN)/python -m pytest -m "$(ALONE)" || status=$$?; \
	exit $$status

test-fast: $(INSTALLED) ## run the tests to run while editing: no Ray, no training, no long random runs
	@$(BIN)/python -m pytest $(PARALLEL) -m "not ($(ALONE) or slow)"

chaos: $(INSTALLED) ## run the fault scenarios and write their table to RELIABILITY.md
	@$(BIN)/python -m tests.chaos

mutants: $(INSTALLED) ## remove each rule of the ledger and of selling in turn, and check that a test fails without it
	@$(BIN)/python -m tests.billing.ledger.mutants

check: $(INSTALLED) ## lint, check format, types and import contracts, and run tests/test_tidy.py
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/test_tidy.py

format: $(INSTALLED) ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## stop farebox, remove .venv and caches; .farebox with its ledger stays
	@if [ -x $(BIN)/farebox ] && $(BIN)/farebox status >/dev/null 2>&1; then $(BIN)/farebox down; fi
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'farebox needs Python 3.11 or later: install it, or name one with `make PYTHON=/path/to/python3.11 ...`' >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || { \
		echo 'this Python cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv' >&2; \
		rm -rf .venv; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo '.venv was made with an older Python: run `make clean` first' >&2; exit 1; }
	@echo 'installing into .venv (some minutes the first time)'
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
