# Everything runs in .venv, which is made from requirements.txt when it is missing or out of date.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin
# DeepSpeed compiles a small extension at its first start. Inside the virtual environment it cannot collide with another
# version's; without the stale lock of a killed build, the start does not hang.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup train test test-all golden lint bench docs clean
.DEFAULT_GOAL := help

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv from requirements.txt and build DeepSpeed's extension

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q -r requirements-dev.txt
	rm -f $(TORCH_EXTENSIONS_DIR)/*/*/lock $(TORCH_EXTENSIONS_DIR)/*/lock
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m pipeline.training.selftest
	touch $@

train: setup ## the main job on sample books: train, stop, resume, evaluate, fold (about 2 minutes)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python quickstart.py

# Most tests are one process on one core, so two files of them run at a time; those with several processes share.
TEST_JOBS ?= 2
PYTEST := PATH="$(CURDIR)/$(RUN):$$PATH" OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

test: setup ## the tests (minutes)
	$(PYTEST) -m "not slow"

test-all: setup ## the tests with the slow ones
	$(PYTEST) --timeout 1800

golden: setup ## run the golden runs (or ONLY="…"), say what differs from tests/golden/, and write it there (2 minutes)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m tests.golden.record $(ONLY)

lint: setup ## ruff and mypy
	$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

bench: setup ## the benchmarks that run on this machine, which should be idle (with a GPU, gpu_h200 besides)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.head
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.cpu_training
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.cpu_training --kernels
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.pipeline_schedule
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.families
	$(RUN)/python -m docs.families
	if command -v nvidia-smi > /dev/null; then PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.gpu_h200; fi

docs: setup ## regenerate configs/schema.json and docs/config.md from the schema
	$(RUN)/python -m docs.generate

clean: ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
