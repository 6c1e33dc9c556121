# Two commands are enough: `make demo` (pictures in runs/demo) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard kernels/sfd_kernels/cpu/*)

.PHONY: setup demo test lint bench gpu-check clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy "setuptools>=77" wheel cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	# only read by tests, which compare our calls of these GPU libraries with their real signatures
	-$(BIN)/pip install -q --no-deps --target $(VENV)/attention-signatures xformers==0.0.35 flash-attn-4==4.0.0b36
	touch $@

demo: setup
	$(BIN)/sfd demo --out runs/demo

test: setup
	$(BIN)/python -m pytest tests

lint: setup
	$(BIN)/ruff check .

bench: setup
	$(BIN)/python benchmarks/kernels.py

gpu-check: setup
	$(BIN)/python -m pytest tests -m gpu
	$(BIN)/python benchmarks/kernels.py

clean:
	rm -rf build dist *.egg-info
