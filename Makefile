# make demo   set up .venv, then fine-tune the embedded model with HAPO
# make test   set up .venv, then lint, format, types and the CPU tests
#
# Variables: PYTHON (3.11 or newer), VENV, EXTRAS, TORCH_SPEC and TORCH_INDEX. On Linux, PyPI's torch brings gigabytes
# of CUDA libraries; without a GPU, set TORCH_INDEX to the address of PyTorch's CPU wheels.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,wandb,tensorboard,plot
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

# Threads that sleep while they wait; spinning ones stall each other on a shared CPU
export OMP_WAIT_POLICY ?= PASSIVE

PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -q
STAMP := $(VENV)/.rltok-installed

.PHONY: demo test lint install clean

demo: install
	$(VENV)/bin/rltok demo $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest $(ARGS)

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

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
