# One environment, .venv, made once; every target runs the tools in it.

PYTHON ?= python3
OUTPUT_DIR ?= runs/quickstart
ARGS ?=
# what is installed beside the library: see pyproject.toml
EXTRAS ?= dev
# tests at a time
WORKERS ?= $(shell nproc)
UV := uv==0.13.9

VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed looks for ninja and other tools on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# The deepspeed launcher warns where it finds no accelerator; where torch has none either, it is told beforehand.
DEVICE = $(shell $(BIN)/python -c \
	"import torch; print('' if torch.accelerator.is_available() else 'DS_ACCELERATOR=cpu')")

.DEFAULT_GOAL := help
.PHONY: help setup lock pretrain study bench docs test unit lint types check check-oldest check-newest clean
# `make -j check` still runs lint, types and test in that order.
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## .venv with the library and its tools as locked; again only when that changed

# A folder of wheels that pip is told of, as of torch without CUDA, is uv's, too. Compiled once, as each rank imports all
# of it: where Python may not write bytecode, an import takes twice as long else.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(UV)
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --python $(BIN)/python \
		--compile-bytecode -c requirements.lock -e ".[$(EXTRAS)]"
	touch $@

# torch has no hashes: there is a build of it for each kind of device.
lock:  ## requirements.lock anew: the newest versions that pyproject.toml allows, for Python 3.10 and later
	$(BIN)/uv -q pip compile pyproject.toml --extra dev --extra eval --extra docs --universal --python-version 3.10 --upgrade \
		--generate-hashes --no-annotate --custom-compile-command "make lock" -o requirements.lock
	perl -0pi -e 's/^(torch==.*?) \\\n(?:    --hash=.*\n)+/$$1\n/m' requirements.lock

# The default folder is the quickstart's own and is written again; any other is left alone if it holds a run.
pretrain: setup  ## train the quickstart model on two stages; OUTPUT_DIR=folder, ARGS="--name value ..."
	$(DEVICE) $(BIN)/deepspeed --quiet --num_gpus 2 scripts/pretrain.py configs/quickstart.yaml \
		--output_dir $(OUTPUT_DIR) $(if $(filter runs/quickstart,$(OUTPUT_DIR)),--overwrite_output_dir) $(ARGS)

study: setup  ## the small study of methods and heads, half an hour on two cores; ARGS="--jobs 2"
	$(BIN)/python scripts/study.py configs/studies/cpu.yaml $(ARGS)

# On an idle machine: most of an hour on two cores. The slow link needs root, and is left out for anybody else.
bench: setup  ## benchmarks beside other pipelines, into docs/bench
	for name in overhead throughput efficiency prediction traffic memory scaling data job_link; do \
		$(BIN)/python scripts/bench_$$name.py || exit 1; done
	if [ "$$(id -u)" = 0 ]; then $(BIN)/python scripts/bench_slow_link.py; fi

docs: setup  ## pages of docs/ with the reference of the public names, into build/docs
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --python $(BIN)/python \
		-c requirements.lock -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f configs/mkdocs.yml

test: setup  ## all tests, as many at a time as there are cores
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

unit: setup  ## the tests that start no processes and take no seconds
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not processes"

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup  ## pyright
	$(BIN)/pyright

check: lint types test  ## what must pass before a change goes in: lint, types, test

# Of each kind of run one: two stages, blocks, ZeRO 0 to 3, replicas, the baseline, resuming, exits, a shared head; and
# what takes seconds and tries other libraries' models, tokenizers or settings.
RUNS := tests/test_invariants.py tests/test_resume.py::test_resume_equals_never_having_stopped \
	tests/test_export.py::test_every_exit_is_a_model_with_the_loss_that_was_measured \
	tests/test_shared_head.py::test_zero_stages_agree \
	$(addprefix tests/test_,$(addsuffix .py,deepspeed_json document_mask exit_check kernels model_config padding router_loss))

check-oldest: RESOLUTION := lowest-direct
check-newest: RESOLUTION := highest
check-oldest:  ## unit tests and some runs with the oldest versions that pyproject.toml allows, in .check-oldest
check-newest:  ## the same with the newest, in .check-newest
check-oldest check-newest: setup
	$(BIN)/uv venv --clear --python $(PYTHON) .$@
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --python .$@/bin/python \
		--compile-bytecode --resolution $(RESOLUTION) -e ".[dev]"
	PATH="$(CURDIR)/.$@/bin:$$PATH" .$@/bin/pytest -m "not processes" tests
	PATH="$(CURDIR)/.$@/bin:$$PATH" .$@/bin/pytest $(RUNS)

clean:  ## remove .venv and the tools' caches; runs/ stays
	rm -rf $(VENV) .check-oldest .check-newest build *.egg-info .pytest_cache .ruff_cache
	find llm_local scripts tests -name __pycache__ -prune -exec rm -rf {} +
