# Two commands: `make demo` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The lock that VENV was installed from, which every target keeps; cpu for a new one. Another lock needs another VENV.
INSTALLED := $(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*)))
LOCK ?= $(or $(INSTALLED),cpu)
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/$(LOCK).txt)
# The CPU build of torch. Where this index cannot be reached pip warns and takes what it has.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# What torch needs where pip found no CPU build: nothing otherwise, and the lock leaves it out.
CUDA_LIBRARIES := from importlib.metadata import requires; \
  print(*(r.partition(';')[0] for r in requires('torch') if r.startswith(('cuda', 'nvidia'))), sep='\n', end='')
# One line for every twenty packages: progress with and without a terminal. "Processing" is a wheel on this machine.
COUNT = awk -v total=$$(grep -c '^[a-z].*==' requirements/$(LOCK).txt) \
  '/^(Collecting|Processing|Requirement already)/ { if (++n % 20 == 0 || n == total) print "  " n " of " total " packages" } \
   /^Installing collected/ { print "  unpacking them" } /ERROR|error:/ { print } { fflush() }'
# Plain progress lines and no colours when the output is not a terminal are chosen by prefpipe itself.
export PYTHONUNBUFFERED := 1
# Bytecode is kept: without it every process compiles the package and its tests again.
unexport PYTHONDONTWRITEBYTECODE

# The tests run on every core with one thread each; a core that has nothing left takes tests from another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ALL_CORES := -n logical --dist worksteal
FAULTS := tests/faults tests/runs tests/stages/train/test_checkpoint.py tests/rewards/test_code_tests.py tests/rewards/test_odd_endpoints.py \
  tests/test_reading.py tests/test_terminal.py tests/test_processes.py
# What a CPU without AVX-512 computes: kernels of torch, oneDNN and MKL round differently from kind to kind.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: help setup demo test test-fast test-portable proofs faults zoo check fix bench results lock clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(VENV)/installed-$(LOCK)  ## Install everything into .venv (LOCK=cuda for a GPU machine)

$(VENV)/installed-$(LOCK): requirements/$(LOCK).txt pyproject.toml
ifneq ($(or $(INSTALLED),$(LOCK)),$(LOCK))
	@echo "error: $(VENV) was installed from requirements/$(INSTALLED).txt" >&2
	@echo "hint: make $(MAKECMDGOALS) LOCK=$(LOCK) VENV=.venv-$(LOCK) makes another one beside it" >&2
	@exit 2
endif
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),cpu)
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing $(TORCH), CPU build" && \
	  $(BIN)/python -m pip install --no-deps --no-compile --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) $(TORCH); }
	@$(BIN)/python -c "$(CUDA_LIBRARIES)" | xargs -r -d '\n' $(BIN)/python -m pip install --no-compile --progress-bar off
endif
	@echo "installing the pinned packages of requirements/$(LOCK).txt"
	@$(BIN)/python -m pip install --no-deps --no-compile --progress-bar off -r requirements/$(LOCK).txt | $(COUNT)
	@$(BIN)/python -m pip install --quiet --no-deps --retries 1 -r requirements/gym.txt 2>/dev/null || \
	  echo "reasoning-gym is left out: one of its packages needs a C compiler and Python's headers"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@echo "compiling them"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some are templates, or for another Python
	@touch $@

demo: setup  ## Three rounds on a real 135M model, on 2 cores; the second time seconds
	@$(BIN)/prefpipe demo

test: setup check  ## The whole test suite
	@$(PYTEST) $(ALL_CORES) -m "not vllm"
	@VLLM_CPU_OMP_THREADS_BIND=nobind $(PYTEST) -n logical --dist loadfile -m vllm

test-fast: setup  ## What starts no process and is not slow: for the inner loop
	@$(PYTEST) $(ALL_CORES) -m "not vllm and not slow and not process"

test-portable: setup  ## The suite as on a CPU with AVX2 only, then every proof as on one without either
	@$(AVX2) $(PYTEST) $(ALL_CORES) -m "not vllm"
	@ATEN_CPU_CAPABILITY=default PREFPIPE_ALL_PROOFS=1 $(PYTEST) $(ALL_CORES) tests/proofs

proofs: setup  ## Every proof that trains, over all of its seeds (`make test` takes one seed)
	@PREFPIPE_ALL_PROOFS=1 $(PYTEST) $(ALL_CORES) tests/proofs

faults: setup  ## Every crash test of docs/reliability.md: kills, full disks, edited and odd files, at all points
	@PREFPIPE_ALL_FAULTS=1 $(PYTEST) $(ALL_CORES) $(FAULTS)

zoo: setup  ## Every model of docs/models.md, through score and train (`make test` takes a sample)
	@PREFPIPE_ALL_MODELS=1 $(PYTEST) $(ALL_CORES) tests/zoo

check: setup  ## Format, lint, types, layers
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright & types=$$!; { $(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports; }; layers=$$?; \
	  wait $$types && exit $$layers

fix: setup  ## Format and fix what can be fixed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	@for schema in stages/*/schema.json; do \
	  $(BIN)/prefpipe config $$(basename $$(dirname $$schema)) --schema > $$schema || exit 1; \
	done
	@$(BIN)/python -m tests.meta.reference
	@$(BIN)/python -m tests.meta.stub && $(BIN)/ruff format --quiet prefpipe/__init__.pyi

bench: setup  ## Measurements against public peers (about an hour, 12 GB of disk; QUICK=--quick for a look)
	@mkdir -p runs && for name in train_vs_trl plan_accuracy growth separate_rows generate build_pairs scale; do \
	  $(BIN)/python benchmarks/$$name.py $(QUICK) --json runs/$$name.json || exit 1; \
	done

results: setup  ## What reference, loss, rounds and pair rule do to a small policy: docs/results (QUICK=--quick for a look)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py $(QUICK)

lock:  ## Resolve both lock files again
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@for lock in cpu cuda; do \
	  $(BIN)/uv pip compile pyproject.toml --quiet --extra train --extra embedded --extra rewards --extra math --extra report --extra cluster --extra dev --extra $$lock \
	    --override requirements/overrides-$$lock.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    $(UV_OPTIONS) --no-emit-index-url --no-emit-find-links --annotation-style line --no-header --output-file requirements/$$lock.txt && \
	  sed -i -e 's/+cpu//' -e "1i # Made by \`make lock\` from pyproject.toml and overrides-$$lock.txt (which says what is left out, and why)." \
	    requirements/$$lock.txt; \
	done
	@$(BIN)/uv pip compile pyproject.toml --quiet --extra gym --constraint requirements/cpu.txt --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 $(UV_OPTIONS) --no-emit-index-url --no-emit-find-links --no-annotate \
	  --no-header | grep -vxF -f <(grep -o '^[^ ]*' requirements/cpu.txt) > requirements/gym.txt
	@sed -i '1i # Made by `make lock`: what reasoning-gym needs beside cpu.txt. Some of it is compiled: see the Makefile.' requirements/gym.txt

clean:  ## Remove .venv and runs/
	@rm -rf $(VENV) runs
