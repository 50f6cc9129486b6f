# Everything a clone needs: Python 3.11 or newer, git and make. The environment is made on first use and kept in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint audit format gpu-visit

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# A student distilled here and now, measured beside its teacher; about ten minutes on two CPU cores.
demo: .venv/ready
	$(BIN)/sid distill --teacher emoji-teacher --output runs/demo
	$(BIN)/sid eval emoji-teacher runs/demo --untrained 1 --fid --clip --accuracy --num 400 --picture runs/demo/comparison.png --overwrite
	@echo "picture: runs/demo/comparison.png"
	@echo "run folder: runs/demo"

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The checks that repeat themselves: nineteen more runs killed twice each, 10,000 odd files for every reader.
soak: .venv/ready
	$(BIN)/python -m pytest -m soak --durations 0 tests/test_reliability.py tests/test_parallel.py tests/test_export.py
	SID_FUZZ_CASES=10000 $(BIN)/python -m pytest --durations 0 tests/test_fuzz.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known holes in the libraries that are installed here.
audit: .venv/ready
	$(BIN)/python .ci/audit $(BIN)/pip-audit

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything that a GPU can tell, in nine minutes: ARGS=--smoke tries every part at a tiny size on the CPU. Needs torch, transformers
# and accelerate; uses .venv where it is there, else $(PYTHON).
gpu-visit:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu.visit $(ARGS)
