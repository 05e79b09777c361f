# pack: the four things a developer does. Each needs only Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MLFLOW := $(VENV)/mlflow

.PHONY: help install demo test lint bench clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Create .venv and install pack with all that the tests use

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pack needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "== creating $(VENV) and installing pack (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(MLFLOW)/.installed: constraints.txt | $(STAMP)
	@echo "== installing the MLflow server that the tests talk to, beside pack"
	@$(PYTHON) -m venv $(MLFLOW)
	@$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mlflow
	@touch $@

demo: $(STAMP) ## Train the example models, merge them with TIES, show what it did
	@$(BIN)/python examples/demo.py

test: $(STAMP) $(MLFLOW)/.installed ## Run every test
	@echo "== training the example models (kept in examples/models/, about two minutes the first time)"
	@$(BIN)/python examples/make_models.py
	@echo "== running the tests"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)
	@echo "== all tests passed; the example models lie in examples/models/"

lint: $(STAMP) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@echo "== style and types are clean"

bench: $(STAMP) ## Measure against peers (about 90 minutes, 25 GB of disk)
	@$(BIN)/python -m benchmarks.merge
	@$(BIN)/python -m benchmarks.adapters
	@$(BIN)/python -m benchmarks.gguf
	@$(BIN)/python -m benchmarks.release
	@$(BIN)/python -m benchmarks.quantize
	@$(BIN)/python -m benchmarks.onnx
	@$(BIN)/python -m benchmarks.remote
	@$(BIN)/python -m benchmarks.ray

clean: ## Remove what the targets above made
	rm -rf $(VENV) examples/models benchmarks/work dist build
