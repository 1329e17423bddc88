# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEV = $(VENV)/.installed-dev
# vLLM pins what it is built with, so it has an environment of its own
VLLM_VENV ?= .venv-vllm
VLLM = $(VLLM_VENV)/.installed

.PHONY: demo test test-gpu test-vllm lint types unit sanitize clean

demo: $(STAMP)  ## install, fetch the demo model, quantize it, generate text
	$(BIN)/anyfp4 demo

test: lint types unit  ## install, then lint, types and tests

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

unit: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-gpu: $(DEV)  ## the tests that need a GPU, on one
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu --numprocesses auto --maxprocesses 12

# one OpenMP thread: vLLM's small ops wait for each other's threads for milliseconds where the processors are busy
test-vllm: $(VLLM)  ## install vLLM for CPUs, then test anyfp4 as its plugin
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm

sanitize: $(DEV)  ## kernel tests under ASan and UBSan
	PYTHON=$(BIN)/python sh tests/kernels/sanitize.sh

# torch first and alone: with it installed, nothing else pulls another build of it
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(1)]'
	touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,serve)

# torch for CUDA and for ROCm come with the Triton that they need, the latter under another name, and torch for CUDA with
# NVRTC; torch for the CPU comes with neither, and the tests of the kernels want them. So they are no extra of the
# package: pip could not tell these apart.
$(DEV): pyproject.toml constraints.txt
	$(call install,dev)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile \
		--constraint constraints.txt 'triton; platform_system == "Linux"'
	$(BIN)/python -c 'import nvidia.cu13' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile \
		--constraint constraints.txt 'nvidia-cuda-nvrtc>=13; platform_system == "Linux" and platform_machine == "x86_64"'
	touch $(STAMP)

# pip compiles no bytecode: most of what vLLM needs is never imported here
$(VLLM): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
