# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv, all packages.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo-output
BUDGET ?= default
KILLS ?= 100
TEST_WORKERS ?= 2
INSTALLED := $(VENV)/installed
BIN := $(CURDIR)/$(VENV)/bin
# Ninja and the deepspeed launcher are found on PATH.
export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo docs test test-slow lint chaos gpu-check install clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## the virtual environment with everything that tests and demo need

# torch first and alone: DeepSpeed's build looks for it. seqeval comes as source only, and what builds it is fetched
# by an isolated build alone.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt seqeval
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,dev]'
	@touch $@

demo: $(INSTALLED)  ## a real 135M LLM through LLM2Vec, measured after every step (BUDGET=quick|default|full)
	$(BIN)/llm2vec-ds demo --output $(OUTPUT) --budget $(BUDGET)
	@echo 'To call llm2vec-ds yourself: . $(VENV)/bin/activate'

test: $(INSTALLED)  ## the tests, about 10 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n $(TEST_WORKERS) --dist loadscope

test-slow: $(INSTALLED)  ## what takes longer: the real model, a SLURM cluster, servers, the README's commands
	@tests/slurm/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(TEST_WORKERS) --dist loadgroup

chaos: $(INSTALLED)  ## over a hundred kills at every file operation of a save: nothing may be lost (KILLS=100)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.chaos --kills $(KILLS)

# Without --quiet, which drops the warnings that --strict counts.
docs: $(INSTALLED)  ## the documentation as a site, into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds nothing: a GPU machine's own Python serves, if its torch sees the GPU.
PART ?= kernels training contrastive tests
gpu-check:  ## checks and benchmarks on a GPU into benchmarks/results/; PART=kernels: one part, 4 minutes at most
	@for python in $(BIN)/python $(PYTHON) /usr/bin/python3 /usr/local/bin/python3; do \
	  if "$$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    exec "$$python" benchmarks/gpu_check.py --part $(PART); \
	  fi; \
	done; \
	echo "error: no Python here has a torch that sees a CUDA device: make gpu-check PYTHON=/path/to/python3"; exit 1

clean:  ## remove the environment and what runs left here
	rm -rf $(VENV) build runs demo-output
