# Two commands do everything on a fresh machine, set-up included:
#   make quickstart [CORPUS="a.txt b.jsonl"]    train a small StagFormer on two processes
#   make test                                   lint and the test suite
# Everything is installed into .venv from pyproject.toml, at the versions of constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
CORPUS ?=
PYTEST_ARGS ?=
FAULTS ?=
FRESH ?=
HOSTS ?=
SLOTS ?=
SPARES ?=
SHARED ?=
OUTPUT ?=
ONLY ?=
NCCL ?=

# The first interpreter found that stagdist runs on; PYTHON=/path/to/python chooses another.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for candidate in python3 python3.12 python3.11; do \
	"$$candidate" -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo "$$candidate"; break; }; done)

.PHONY: help install quickstart test test-all ruff lint fuzz clients resume-matrix kill-saves gpu-check lab \
	lab-matrix faults clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(STAMP) ## Create .venv and install everything (the other targets do this themselves)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUPPORTED)'; then \
		echo "stagdist needs Python 3.11 or 3.12, but $(or $(PYTHON),python3) is" \
			"$$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo missing)." >&2; \
		echo "Install one of them, or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version) ($(PYTHON))"
	@"$(PYTHON)" -m venv $(VENV)
	@echo "Installing the packages of constraints.txt into $(VENV), a few minutes; log: $(VENV)/install.log"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off \
		--constraint constraints.txt --editable ".[mpi,test]" 2>&1 | tee $(VENV)/install.log \
		| sed -unE -e 's/^ *(Collecting [^ ]+).*/  \1/p' -e 's/^ *Building wheels.*/  Building wheels/p' \
			-e 's/^ *Installing collected packages.*/  Unpacking/p' -e 's/^ *(ERROR.*)/\1/p' \
		|| { echo "The installation failed. The end of $(VENV)/install.log:" >&2; \
			tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@echo "Compiling the packages' Python files, so that no process has to do it"
	@# Not a third of them that hardly any process imports. Some files are templates that are no Python.
	@$(BIN)/python -m compileall -q -j 0 -x '/(pip|tests|testing/_internal|transformers/models)/' $(VENV)/lib \
		>/dev/null 2>&1 || true
	@touch $@
	@echo "Installed."

clients: $(CLIENTS)/.installed ## Install the clients of the server that `make test-all` tests, into .venv-clients

# The clients want other versions of packages than stagdist is tested with. lm-evaluation-harness also scores models
# in this process, to compare; for that it is in .venv.
$(CLIENTS)/.installed: tests/clients/requirements.txt $(STAMP)
	@"$(PYTHON)" -m venv $(CLIENTS)
	@echo "Installing the packages of tests/clients/requirements.txt into $(CLIENTS), a few minutes"
	@$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --no-input --quiet --progress-bar off \
		--requirement tests/clients/requirements.txt
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --progress-bar off \
		--constraint constraints.txt --editable ".[mpi,test,eval]"
	@touch $@

quickstart: $(STAMP) ## Train a small StagFormer on CORPUS="files" (default: Python's own source)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/quickstart.py $(if $(strip $(CORPUS)),--corpus $(CORPUS))

ruff: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: ruff ## Ruff and mypy
	$(BIN)/mypy

# One thread per process: several ranks share the cores, and sums keep one order. No test may use the network.
test test-all lab-matrix: export OMP_NUM_THREADS := 1
test test-all lab-matrix: export HF_HUB_OFFLINE := 1
test test-all lab-matrix: export TOKENIZERS_PARALLELISM := false
test test-all lab-matrix: export WANDB_MODE := offline
test test-all lab-matrix: export MPLBACKEND := Agg
# With arguments one pytest process runs what they select, without them mypy and two processes run at once.
test: ruff ## Lint and the test suite (PYTEST_ARGS="-k name" narrows it)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m $(if $(PYTEST_ARGS),pytest,tests.suite) -m "not slow" $(PYTEST_ARGS)

test-all: ruff clients ## The same with the slow tests, for every night
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m $(if $(PYTEST_ARGS),pytest,tests.suite) $(PYTEST_ARGS)

fuzz: export MUTATIONS := 2000
fuzz: export OMP_NUM_THREADS := 1
fuzz: export HF_HUB_OFFLINE := 1
fuzz: $(STAMP) ## Give every reader 2,000 damaged or foreign files (`make test` runs 20 of each)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

resume-matrix: export OMP_NUM_THREADS := 1
resume-matrix: $(STAMP) ## Train on every grid, resume on every grid, compare weights and losses
	$(BIN)/python -m tests.training.saving.resume_matrix --output benchmarks/results/resume-matrix.json

kill-saves: export OMP_NUM_THREADS := 1
kill-saves: $(STAMP) ## Kill a run 200 times while it saves; no published checkpoint may be lost
	$(BIN)/python -m tests.launch.kills --output benchmarks/results/kills.json

gpu-check: $(STAMP) ## Everything that only a GPU can show, 9 minutes at most (OUTPUT=FILE ONLY="names" NCCL=library)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.gpu.check $(if $(ONLY),--only $(ONLY)) \
		$(if $(NCCL),--nccl $(NCCL)) --output $(or $(OUTPUT),benchmarks/results/gpu-check.json)

faults: export OMP_NUM_THREADS := 1
faults: $(STAMP) ## Plant every fault in the lab, then 30 in one run (root; FAULTS="..." narrows it)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.lab.fault_report $(if $(FAULTS),--faults $(FAULTS)) \
		$(if $(FRESH),--fresh) --output benchmarks/results/faults.json

lab: $(STAMP) ## Bring up two hosts on this machine (root; HOSTS= SLOTS= SPARES= SHARED=), and explain how to use them
	@$(BIN)/python -m tests.lab.command up $(if $(HOSTS),--hosts $(HOSTS)) $(if $(SLOTS),--slots $(SLOTS)) \
		$(if $(SPARES),--spares $(SPARES)) $(if $(SHARED),--shared $(SHARED))

lab-matrix: $(STAMP) ## The tests of several hosts with every launcher on every grid (root; `make test` runs a part)
	PATH="$(CURDIR)/$(BIN):$$PATH" LAB=all $(BIN)/python -m pytest tests/lab $(PYTEST_ARGS)

clean: ## Remove .venv, .venv-clients and caches; runs/ is kept
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
