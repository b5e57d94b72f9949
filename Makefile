# Everything runs in .venv, which the first target that needs it creates.
#
#   make quickstart   train LeNet on digits, spatial and spectral, and draw what it costs
#   make test         lint, types, tests
#   make bench        benchmarks on this machine
#   make gpu-suite    tests and benchmarks with Triton on a GPU
#   make PYTHON=python3.12 test     with another interpreter
#   make DEVICE=cuda quickstart     on another device

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUICKSTART := runs/quickstart
BENCH := runs/bench
PYTEST_ARGS ?=
COMPARE_ARGS ?=
ifdef DEVICE
COMPARE_ARGS += --device $(DEVICE)
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test bench gpu-suite lint format clean distclean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; the second holds the first.
$(VENV)/.apps: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[apps]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[apps,test,dev]"
	@touch $(VENV)/.apps $@

quickstart: $(VENV)/.apps
	$(BIN)/spectriton compare --model lenet --data digits --threshold 0.5 --epochs 20 --seed 0 --out $(QUICKSTART) $(COMPARE_ARGS)
	@echo
	@echo "figures: $(QUICKSTART)/report.json"
	@find $(QUICKSTART) -type f \( -name '*.png' -o -name '*.svg' -o -name '*.pdf' \) | sort | sed 's/^/plot:    /'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy spectriton kernels

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.dev
	@mkdir -p $(BENCH)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(BENCH)/bench.json $(PYTEST_ARGS)
	$(BIN)/python -m bench.report $(BENCH)/bench.json

gpu-suite: $(VENV)/.dev
	PYTHON=$(BIN)/python bench/gpu_suite.sh $(SUITE_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
