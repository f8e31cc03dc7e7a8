# make demo: the whole way on real data, on a CPU.  make test: the whole suite.  Both set up what they need in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
unexport PYTHONDONTWRITEBYTECODE  # every start would compile 10,000 files again

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
TEST_WORKERS ?= 2  # each takes up to 3 GB and, where a test starts ranks, more than one core
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint lock clean-demo

# ----------------------------------------------------------------------------------------------------- environment

.venv/installed: constraints.txt overrides.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"star-dist needs Python 3.11, this is {sys.version.split()[0]}; use make PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --override overrides.txt --editable '.[demo,dev]'
	touch $@

# Renews the tested set of pins from setup.py's ranges.
lock:
	$(BIN)/uv pip compile setup.py --override overrides.txt --extra demo --extra dev --python-version 3.11 --no-annotate --quiet --upgrade --output-file constraints.txt

# ------------------------------------------------------------------------------------------------------------ demo
# Every step is a command of its own, skips what is done, and goes on where it was interrupted.

demo: .venv/installed
	$(BIN)/python -m data_prep.openmoji --out $(DEMO)/pictures --side 32
	$(BIN)/deepspeed --num_gpus 2 launcher/train_tokenizer.py --config configs/tokenizer_demo.json
	$(BIN)/python -m data_prep.tokenize --config configs/prep/demo.json
	$(BIN)/deepspeed --num_gpus 2 launcher/train.py --config configs/demo.json
	$(BIN)/python launcher/export.py $(DEMO)/train --out $(DEMO)/export --licence cc-by-sa-4.0
	$(BIN)/python launcher/sample_grid.py $(DEMO)/export --data $(DEMO)/data --captions configs/demo_captions.txt --guidance-by-scale 1,1,2,3 --top-k 1,1,2,2 --out $(DEMO)/samples.png
	@echo "Done: look at $(DEMO)/samples.png"

clean-demo:
	rm -rf $(DEMO)

# ------------------------------------------------------------------------------------------------------------ tests

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadgroup

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
