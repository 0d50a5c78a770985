# make demo    a dataset, an artifact, a trained model and its text, from nothing
# make demo-dp two workers on this machine: the demo's artifact and dataset, the losses of one worker
# make test    the tests;  make check: lint, types, tests
# make clean   back to a fresh clone; runs and artifacts under outputs/ stay, except the demo's
#
# PYTHON=python3.12   another interpreter for .venv
# VENV=               no .venv: PYTHON as it is, which then has torch and the rest (a GPU machine)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := demo
.PHONY: demo demo-dp test check lint types clean

VENV ?= .venv
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
endif

ifeq ($(VENV),)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
endif

JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PIP := $(PY) -m pip --disable-pip-version-check --quiet

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "error: No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1 || true). Expected 3.11 or newer; name another one: make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments. Install its venv package (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) …"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV), with what tests and checks need …"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed

# The demo: settings that both commands share, so that the artifact fits the run.
DEMO := outputs/demo
DEMO_STEPS ?= 500
DEMO_TEXT ?= corpus
DEMO_SETTINGS := checkpoint.config_name=demo model.max_seq_length=256 training.batch_size=8 compile.output_dir=$(DEMO)/artifacts

demo: $(INSTALLED)
	@rm -rf $(DEMO)
	$(PY) apps/prepare_data.py input=$(DEMO_TEXT) output_dir=$(DEMO)/dataset max_seq_length=256 vocab_size=4096
	$(PY) apps/train_llm.py command=compile $(DEMO_SETTINGS)
	$(PY) apps/train_llm.py command=run $(DEMO_SETTINGS) training.dataset=$(DEMO)/dataset training.output_dir=$(DEMO)/run \
		training.max_steps=$(DEMO_STEPS) optimizer.lr=2e-3 optimizer.beta2=0.95 schedule.warmup_steps=30 logging.every=20
	$(PY) apps/generate_text.py checkpoint.model_name_or_path=$(DEMO)/run prompt="def read(self" max_new_tokens=64 temperature=0.7 top_k=40
	@echo
	@echo "Dataset    $(DEMO)/dataset"
	@echo "Artifact   $$(ls $(DEMO)/artifacts/*.substrate)"
	@echo "Model      $(DEMO)/run, a folder that plain transformers opens"
	@echo "Report     $(DEMO)/run/report.html"
	@grep -E '^(Evaluation loss|Unigram entropy)' $(DEMO)/run/summary.txt

# Two workers with 8 rows each, and one worker with two microbatches of 8: the same artifact, the same steps.
MPIRUN := $(if $(VENV),$(VENV)/bin/mpirun,mpirun)
DP_STEPS := $$(( $(DEMO_STEPS) < 100 ? $(DEMO_STEPS) : 100 ))
DP_SETTINGS = $(DEMO_SETTINGS) training.dataset=$(DEMO)/dataset training.global_batch_size=16 training.max_steps=$(DP_STEPS) \
	optimizer.lr=2e-3 optimizer.beta2=0.95 schedule.warmup_steps=30 logging.every=20 training.overwrite_output_dir=true training.evaluate=false

demo-dp: $(INSTALLED)
	@ls $(DEMO)/artifacts/*.substrate $(DEMO)/dataset >/dev/null 2>&1 || $(MAKE) demo
	$(MPIRUN) -np 2 $(PY) apps/train_llm.py command=run $(DP_SETTINGS) training.output_dir=$(DEMO)/two-workers
	$(PY) apps/train_llm.py command=run $(DP_SETTINGS) training.output_dir=$(DEMO)/one-worker
	@echo
	@echo "Loss of the last step, two workers   $$(tail -n 1 $(DEMO)/two-workers/per_step_metrics.csv | cut -d, -f2)"
	@echo "Loss of the last step, one worker    $$(tail -n 1 $(DEMO)/one-worker/per_step_metrics.csv | cut -d, -f2)"

test: $(INSTALLED_DEV)
	$(PY) -m pytest -n $(JOBS) --dist worksteal -q

check: lint types test

lint: $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED_DEV)
	$(PY) -m mypy

clean:
	rm -rf .venv build dist *.egg-info outputs/demo .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
