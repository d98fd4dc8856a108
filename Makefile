# The commands of this project. CONTRIBUTING.md says when to use which.
#
#   TORCH_INDEX_URL=URL  take torch from another package index, for example one with builds
#                        without CUDA
#   PYTHON=python3.12    make the environment with another interpreter (3.11 or later)
#   ONCE=1               `make run` exits after its one completion
#   TEST_PROCESSES=0     `make test` in pytest itself, as for a debugger (three by default: much of a test is waiting)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH_INDEX_URL ?=
ONCE ?=
TEST_PROCESSES ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
pinned = $(shell sed -n 's/^$(1)==/$(1)==/p' requirements.lock)

.DEFAULT_GOAL := help
.PHONY: help setup run test lint format typecheck protos docs bench soak lock

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(STAMP) ## make .venv with pinned dependencies; quick when nothing changed

# torch comes by pip and first: pip honours an index or a wheel folder of the machine, and uv then leaves it alone.
$(STAMP): requirements.lock pyproject.toml $(wildcard collegium/native/*.c collegium/native/*.h)
	@test -x $(BIN)/python || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: Python 3.11 or later is needed; set PYTHON to one and remove $(VENV)" >&2; exit 1; }
	@echo "setup: installing $(call pinned,torch) (a large download when it is not cached)"
	@$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(call pinned,torch)
	@echo "setup: installing the other pinned packages"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet $(call pinned,uv)
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	@rm -f collegium/native/_native*.so # where the build fails, an old one must not stay
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'from collegium.model.native import library; lib = library(); print("setup:", f"native library built, {lib.isa} instructions" if lib else "the native kernels cannot be used on this machine: torch computes the experts, more slowly")'
	@touch $@
	@echo "setup: done"

run: setup ## serve the demo model from a whole cluster on this machine until Ctrl-C
	@exec $(BIN)/collegium up models/demo-lm --workers 2 $(if $(ONCE),--once)

test: lint ## everything that proves the project
	@exec $(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## style, types, import contracts, protos
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(BIN)/buf lint

format: setup ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## write docs/telemetry.md and docs/settings.md from the registries of names and the services' settings
	@$(BIN)/python -m collegium.fabric.telemetry_page > docs/telemetry.md
	@$(BIN)/python docs/settings_page.py > docs/settings.md

protos: setup ## write the stubs in collegium/v1 anew
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/collegium/v1/*.proto

bench: setup ## measure serving against transformers in the same run
	@exec $(BIN)/python benchmarks/serving.py $(BENCH_ARGS)

soak: setup ## long outages and faults; takes as long as it takes
	@exec $(BIN)/python -m pytest -m soak --timeout=0 $(PYTEST_ARGS)

native-check: ## the C library under sanitizers, SECONDS of fuzzing each (600 by default); with clang by libFuzzer
	@$(MAKE) -C tests/native check

lock: setup ## pin what the environment holds now
	@{ sed -n '/^#/p' requirements.lock; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^(nvidia-|triton)' | sed 's/+cpu$$//'; } > $(VENV)/lock
	@mv $(VENV)/lock requirements.lock
