# `make demo` and `make test` need nothing but Python 3.10 to 3.13 with venv, and a package index. The tests of the HTML report
# take a Chromium on the PATH (Debian: apt-get install chromium) and skip without one.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types engines clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	@BIN=$(BIN) sh examples/demo.sh

test: .venv/installed lint types
	$(BIN)/pytest -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# Gigabytes and half an hour: an environment for each engine in .engines/.
engines: .venv/installed
	$(BIN)/python benchmarks/engines/run.py --write docs/ENGINES.md

clean:
	rm -rf .venv build *.egg-info
