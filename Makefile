# Two commands are enough: `make demo` (pictures in runs/demo) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c constraints.txt
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

.PHONY: setup demo test lint bench soak report gpu-check clean

setup: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt kernels/cpu_build.py kernels/CMakeLists.txt $(wildcard kernels/sfd_kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" wheel cmake ninja
	$(PIP) --no-build-isolation -e .
	touch $@

# What only tests and benchmarks need. Lines that begin with a dash hold optional packages: where they do not
# install, their tests are skipped with the reason. The last is only read, to compare our calls with the real signatures.
$(TESTABLE): $(INSTALLED)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) --group dev
	-DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	-$(PIP) nvidia-dali-cuda120
	-$(PIP) datasets
	-$(PIP) "gradio>=6" playwright
	-$(PIP) --no-deps --target $(VENV)/attention-signatures xformers flash-attn-4
	touch $@

demo: $(INSTALLED)
	$(BIN)/sfd demo --out runs/demo

# Two processes, each with whole files: fixtures of a file are made once.
test: $(TESTABLE)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

lint: $(TESTABLE)
	$(BIN)/ruff check .

bench: $(TESTABLE)
	$(BIN)/python benchmarks/kernels.py

# The long proofs of training: kills, two ranks against one, XXL at its real size (about an hour, 21 GiB of free memory).
soak: $(TESTABLE)
	$(BIN)/python benchmarks/soak.py

# Compiles every Triton launch of XL, XXL and B without a GPU (about five minutes); a test compares the result committed.
report: $(TESTABLE)
	$(BIN)/python -m sfd_kernels.offline.report --json benchmarks/results/triton_report.json

# For whoever has a GPU: the tests marked gpu, then accuracy and times in one JSON (nine minutes; benchmarks/README.md).
# Both run, whatever the first gives.
gpu-check: $(TESTABLE)
	-$(PIP) --no-deps liger-kernel pytest-xdist execnet
	$(BIN)/python -m pytest tests -m gpu -n 8 -q; tests=$$?; \
	$(BIN)/python benchmarks/gpu_check.py --json benchmarks/results/gpu_check.json && exit $$tests

clean:
	rm -rf build dist *.egg-info
