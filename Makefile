# Two commands for a newcomer: `make contract` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONTRACT_FLAGS ?= --min-speedup 1.5

.PHONY: help contract test test-all check format golden results clean

help:
	@echo "make contract   install into $(VENV) and contract TinyViT-21M to 5M on real digits (10 to 15 minutes)"
	@echo "make test       the fast tests (under 7 minutes on 2 quiet cores)"
	@echo "make test-all   every test, the slow ones too"
	@echo "make check      ruff, ruff format and mypy --strict"
	@echo "make format     let ruff fix and format"
	@echo "make golden BASE=COMMIT   the golden outcome of two commits, compared to the bit"
	@echo "make results    remake results/: 3 random seeds on digits and on fractals (hours)"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

contract: $(STAMP)
	$(BIN)/python -m nas.contract --seed 21M --target-params 5M $(CONTRACT_FLAGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

golden: $(STAMP)
	test -n "$(BASE)" || { echo "name a commit: make golden BASE=COMMIT"; exit 2; }
	PYTHON=$(abspath $(BIN)/python) tests/golden/compare.sh "$(BASE)"

results: $(STAMP)
	$(BIN)/python -m benchmarks.contract

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
