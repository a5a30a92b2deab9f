# gnomon: the two commands are `make serve` and `make test`.
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
SOURCES := pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/* csrc/*/*)
PORT ?= 8000

.PHONY: help serve install test test-slow lint types contract unit format clean
help:
	@echo "make serve      install, fetch the default model, serve on http://127.0.0.1:$(PORT)"
	@echo "make test       install, then lint, types, import contract and all tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make format     format the code"

$(STAMPS)/venv: constraints.txt
	@command -v g++ >/dev/null || echo "note: no C++ compiler (apt-get install g++): the pure-torch kernels will be used"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gnomon needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/install: $(STAMPS)/venv $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMPS)/install $@

install: $(STAMPS)/install

serve: install
	$(BIN)/gnomon pull smollm2-135m-instruct
	$(BIN)/gnomon serve --port $(PORT)

test: lint types contract unit

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

contract: $(STAMPS)/dev
	$(BIN)/lint-imports --no-cache

unit: $(STAMPS)/dev
	$(BIN)/gnomon pull smollm2-135m-instruct minilm-l6-v2
	$(BIN)/pytest

test-slow: $(STAMPS)/dev
	$(BIN)/pytest -m slow --timeout 3600

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(STAMPS) build dist
