# `make` lists the targets. Each sets up .venv by itself, once; `make PYTHON=/path/to/python3.12 test` chooses the Python.

VENV := .venv
BIN := $(VENV)/bin
# The environment is ready for exactly this place and these files; a change of any of them installs again.
STATE := $(shell { pwd; cat pyproject.toml setup.py constraints.txt; } | cksum | cut -d' ' -f1)
READY := $(VENV)/ready-$(STATE)
PIP := $(BIN)/python -m pip --disable-pip-version-check $(if $(CI),-q) install -c constraints.txt
WORKERS ?= 2

# A Python counts only if it runs: version managers put names on PATH that do not.
FIND_PYTHON = for python in $(PYTHON) python3 python3.12 python3.11; do \
	    $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && break; \
	    python=; \
	done

.PHONY: help test demo lint fmt bench prove learn tiny clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

test: $(READY)  ## run every test on the CPU; ARGS="tests/golden -k vicuna" runs some
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

demo: $(READY)  ## small models that answer: convert, prove against PyTorch, ask, search, train; 5 minutes
	$(BIN)/python -m mgpt4_jax.demo $(ARGS)

lint: $(READY)  ## ruff and mypy, changing nothing
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check
	$(BIN)/mypy

fmt: $(READY)  ## format, and mend what can be mended by rule
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## measure speed beside PyTorch; benchmarks/RESULTS.md keeps the figures
	$(BIN)/python benchmarks/side_by_side.py $(ARGS)

prove: $(READY)  ## true sizes: convert 7B, verify a ViT-g; needs 45 GB: ARGS="--scratch DIR"
	$(BIN)/python benchmarks/convert_size.py $(ARGS)
	$(BIN)/python benchmarks/verify_size.py $(ARGS)

learn: $(READY)  ## pre-train a small Q-Former in minutes, and find held-out pictures; ARGS="--seed 1"
	PYTHONPATH=tests $(BIN)/python -m train.learn_pairs $(ARGS)

tiny: $(READY)  ## train a small MiniGPT-4 from nothing, stage by stage, and measure it; an hour: ARGS="--jobs 2"
	$(BIN)/python -m mgpt4_jax.tiny $(ARGS)

clean:  ## remove the environment, the caches and what builds leave
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY):
	@$(FIND_PYTHON); \
	if [ -z "$$python" ]; then \
	    echo "make: found no Python 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "[1/3] making $(VENV) with $$($$python --version)"; \
	    $$python -m venv --clear $(VENV) || { \
	        rm -rf $(VENV); \
	        echo "make: $$python cannot make environments; install its venv module (Debian, Ubuntu: python3.x-venv)"; \
	        exit 1; \
	    }; \
	else \
	    echo "[1/3] keeping $(VENV), $$($(BIN)/python --version)"; \
	fi
	@echo "[2/3] updating pip"
	@$(PIP) pip setuptools
	@echo "[3/3] installing mgpt4-jax and the pinned packages of constraints.txt: once, a minute or more, about 2 GB"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/ready-*
	@touch $@
