# `make` alone lists what there is. Every target sets up what it needs; a second run installs nothing.
#
# PYTHON=...     the interpreter for a new virtual environment (default: the first of python3, python3.13, ... that is 3.11 or later)
# VENV=...       where the virtual environment is (default: .venv)
# ARGS=...       more arguments for the command: make demo ARGS="--set model.num_levels=1 --keep-stack"
# INSTALLER=pip  install with pip instead of uv
# JOBS=2         processes that run tests

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
# Bytecode is written when a module is first imported, not at installation: most modules never are.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?=
VENV ?= .venv
ARGS ?=
INSTALLER ?= uv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup demo test test-slow test-kubernetes lint images e2e-docker bench bench-gpu bench-quality compile clean

help: ## Show this list.
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 17

setup: $(INSTALLED) ## Make the virtual environment; the targets below do it when needed.
	@:

demo: $(INSTALLED) ## Run the whole pipeline on Fashion-MNIST.
	@exec "$(BIN)/hjepa" run --config demo $(ARGS)

test: lint ## Check style, types and imports, then run all tests that are not slow.
	@"$(BIN)/python" -m pytest -m "not slow and not docker" -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(INSTALLED) ## Run the tests that take minutes.
	@"$(BIN)/python" -m pytest -m "slow and not docker" $(ARGS)

test-kubernetes: $(INSTALLED) ## Test what talks to a cluster with the newest kubernetes client; kfp asks for an older one.
	@folder=$$(mktemp -d)
	trap 'rm -rf "$$folder"' EXIT
	"$(BIN)/python" -m pip install --quiet --no-compile --target "$$folder" kubernetes
	PYTHONPATH=$$folder "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile $(ARGS) tests/test_{fake_apiserver,launcher,launcher_faults,launcher_training,doctor_cluster,cli_job,manifests}.py

lint: $(INSTALLED) ## Check style, types and import contracts.
	@"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

images: ## Build the container images; print their sizes and packages. images/build says what it can be told.
	@exec images/build $(ARGS)

e2e-docker: $(INSTALLED) ## Run the pipeline with each step in its image (make images first), as any user on read-only roots.
	@"$(BIN)/python" -m pytest -m docker -s tests/test_e2e_docker.py $(ARGS)

bench: $(INSTALLED) ## Measure a training step, masks, checkpoints, logging, decoding, data preparation and the loader.
	@for part in step checkpoint logging data loader; do "$(BIN)/python" -m benchmarks.$$part; done

bench-gpu: $(INSTALLED) ## Measure training steps on this machine's NVIDIA GPU.
	@"$(BIN)/python" -m benchmarks.gpu $(ARGS)

bench-quality: $(INSTALLED) ## Train with and without the hierarchy at equal compute, and compare what was learnt: an hour.
	@"$(BIN)/python" -m benchmarks.quality $(ARGS)

compile: $(INSTALLED) ## Compile the pipelines to pipelines/compiled.
	@"$(BIN)/python" -m pipelines.pretrain

clean: ## Remove the virtual environment, caches and built files; runs and their data stay.
	@rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache local_outputs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the fall-back because uv reads none of pip's settings; where pip has an index of its own, uv is not tried.
$(INSTALLED): pyproject.toml constraints.txt
	@suitable() { "$$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
	if ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then
	    found=
	    for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do
	        if suitable "$$candidate"; then found=$$candidate; break; fi
	    done
	    if [ -z "$$found" ]; then
	        echo "error: no suitable Python: tried $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." >&2
	        echo "It has to be 3.11 or later with the venv module (on Debian: apt install python3-venv)." >&2
	        echo "Name one with: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),setup)" >&2
	        exit 1
	    fi
	    "$$found" -m venv --clear "$(VENV)"
	fi
	echo "Installing into $(VENV) (2.5 GB to download where nothing is cached) ..."
	arguments=(-c constraints.txt -e '.[dev]')
	[ -t 2 ] || arguments+=(--quiet)
	with_uv() {
	    [ "$(INSTALLER)" = uv ] || return 1
	    ! "$(BIN)/pip" config list | grep -q '\.index-url=' || return 1
	    "$(BIN)/pip" install --quiet -c constraints.txt uv &&
	    "$(BIN)/uv" pip install --system-certs --python "$(BIN)/python" "$${arguments[@]}"
	}
	if ! with_uv; then
	    echo "Installing with pip, which takes some minutes ..."
	    "$(BIN)/pip" install --no-compile "$${arguments[@]}"
	fi
	touch "$@"
