# Requirements: Python 3.11 or newer, git and make. The first target that needs it creates the virtual environment .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint audit format gpu-visit

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Distill a student and evaluate it and its teacher; about 6 minutes on two CPU cores with bf16 instructions.
demo: .venv/ready
	$(BIN)/sid distill --teacher emoji-teacher --guidance 1.5 --batch-size 8 --steps 400 --output runs/demo
	$(BIN)/sid eval emoji-teacher,steps=20 runs/demo --untrained 1 --fid --clip --accuracy --num 200 --picture runs/demo/comparison.png --overwrite
	@echo "picture: runs/demo/comparison.png"
	@echo "run folder: runs/demo"

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Long tests: nineteen more runs killed twice each, every format of every family in every type, 10,000 invalid files for every reader.
soak: .venv/ready
	$(BIN)/python -m pytest -m soak --durations 0
	SID_FUZZ_CASES=10000 $(BIN)/python -m pytest --durations 0 tests/test_fuzz.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Check the installed libraries for known vulnerabilities.
audit: .venv/ready
	$(BIN)/python .ci/audit $(BIN)/pip-audit

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Check correctness, measure speed and train on a GPU, in nine minutes; ARGS=--smoke runs the same at a tiny size on the CPU, and
# ARGS="--only teacher" (or leaderboard, subjects, flow) other parts. Needs torch, transformers and accelerate; uses .venv if it exists, else
# $(PYTHON).
gpu-visit:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu.visit $(ARGS)
