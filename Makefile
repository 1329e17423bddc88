# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEV = $(VENV)/.installed-dev

.PHONY: demo test lint types unit sanitize clean

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

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
