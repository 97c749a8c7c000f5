# make demo and make test each do all their set-up first: the first to run installs into .venv, the second finds it done.

PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed

BIN := $(VENV)/bin

# For what programs start in their turn: the launcher its ranks, DeepSpeed ninja.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-extended test-faults test-gpu test-hosts bench recipes detectors study study-report docs lint doctor clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Made again when the wanted versions or the way to install them change.
$(STAMP): pyproject.toml setup.py constraints.txt scripts/install.py scripts/build_mmcv.py
	@command -v $(PYTHON) >/dev/null || { echo "set-up stopped: no $(PYTHON); name a Python 3.11: make PYTHON=... $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) scripts/install.py
	@touch $@

setup: $(STAMP) ## install everything into .venv: 3 GB to download, then about 8 minutes on 2 cores

demo: $(STAMP) ## train a small detector with AGVM on two ranks, then its mAP (about 4 minutes)
	@echo "training the demo: 2 ranks, 6 epochs, about 4 minutes on 2 cores"
	OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_configs/agvm_zero2.json --work-dir work_dirs/demo

test: lint ## lint, then all tests, two files of them at a time: ranks wait for one another often enough
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-extended: $(STAMP) ## one more kind of what many tests show, not in make test (about 25 minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m extended --ignore tests/hosts

test-faults: $(STAMP) ## every fault that a run survives, in real processes: a table of what was lost (about 7 minutes)
	$(BIN)/python -m pytest -m "" tests/distributed/test_faults.py tests/distributed/test_nonfinite.py

test-gpu: $(STAMP) ## on one GPU, over NCCL: the reference, loss scaling, streams, trainings in half precision (some 20 minutes)
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m "not extended" tests/gpu $(addprefix tests/distributed/,test_golden.py test_loss_scale.py test_options.py)
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m "" tests/distributed/test_trainer_runs.py -k "fp16 or offload or bf16"

test-hosts: $(STAMP) ## launches over two and three hosts, network namespaces of this machine: needs root, sshd and pdsh (about 8 minutes)
	$(BIN)/python -m pytest -m "" tests/hosts

bench: $(STAMP) ## what AGVM adds to an update: time, memory, bytes; the trainer beside mmdet's (about 80 minutes on 2 cores)
	$(BIN)/python -m benchmarks

recipes: $(STAMP) ## every recipe of configs/, shrunk to two updates: a table (about 10 minutes)
	$(BIN)/python -m benchmarks.recipes

detectors: $(STAMP) ## the modules of every detector that mmdet ships, and a training of nineteen kinds: tables (about 15 minutes)
	$(BIN)/python -m benchmarks.zoo

study: $(STAMP) ## the large-batch study of docs/study.md: what is left of it, two runs at a time (days on 2 cores; it may be interrupted)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[study]
	$(BIN)/python -m benchmarks.study run

study-report: $(STAMP) ## its tables and figures, from the committed lines (seconds)
	$(BIN)/python -m benchmarks.study report

docs: $(STAMP) ## the documentation site, in work_dirs/site, its links checked (a few seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

doctor: $(STAMP) ## what is installed, and what is wrong with it
	@$(BIN)/python -m agvm_ds.doctor

clean: ## remove .venv and what the tools left; data/, work_dirs/ and built wheels stay
	rm -rf $(VENV) *.egg-info build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
