# The Python that makes the virtual environment; everything else runs inside it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# TRL 1.12.0 needs a virtual environment of its own.
PARITY := .venv-parity
# The lowest versions that pyproject.toml allows, likewise.
LOWEST := .venv-lowest

.PHONY: demo test test-long test-lowest faults fuzz audit gpu lint parity control clean

demo: $(STAMP)  ## the whole pipeline on a tiny model, on a CPU
	$(BIN)/rlhf-recipes run tiny

test: lint  ## and all tests that a machine without a GPU can run
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)  ## what proves the same at full size
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m long

test-lowest: $(LOWEST)/.installed  ## the tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: $(STAMP)  ## kills of all that writes, each with one more start: make faults ARGS="--kills 20 --only sft,ppo"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python tests/faults/kills.py $(ARGS)

fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz: $(STAMP)  ## new inputs for all that reads, so many of each kind, or those of a seed: make fuzz EXAMPLES=20000 SEED=1
	EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/pytest -s --hypothesis-seed=$(SEED) tests/invariants/test_refusals.py

audit: $(STAMP)  ## whether PyPI knows of a hole in anything that is installed
	$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

gpu: $(STAMP)  ## what a GPU measures in 12 minutes: make gpu ARGS="--model FOLDER"
	$(BIN)/python tests/benchmarks/gpu.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

parity: $(PARITY)/.dumped $(STAMP)  ## our PPO against TRL 1.12.0's, number by number
	$(BIN)/pytest -q tests/parity
	@cat $(PARITY)/report.md

control: $(PARITY)/.installed $(STAMP)  ## four adapters on one base against TRL 1.12.0's four models: make control ARGS="--seeds 0"
	$(BIN)/python tests/benchmarks/control.py $(ARGS)

$(PARITY)/.dumped: $(PARITY)/.installed tests/parity/trl112.py tests/parity/scenarios.py tests/support/tiny_models.py
	$(PARITY)/bin/python tests/parity/trl112.py $(PARITY)/dump
	@touch $@

$(PARITY)/.installed:
	$(PYTHON) -m venv $(PARITY)
	@echo "Installing TRL 1.12.0 into $(PARITY) (once, some minutes)"
	@$(PARITY)/bin/pip install --quiet --disable-pip-version-check \
		'trl==1.12.0' 'peft>=0.21,<0.22' 'torch>=2.11,<2.14' 'transformers>=5.17,<6'
	@touch $@

$(LOWEST)/.installed: pyproject.toml $(STAMP)
	$(PYTHON) -m venv $(LOWEST)
	@echo "Installing the lowest versions into $(LOWEST) (once, some minutes)"
	@PYTHONPATH=tests $(BIN)/python tests/support/lowest.py > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/pip install --quiet --disable-pip-version-check \
		--constraint $(LOWEST)/constraints.txt --editable '.[dev,notebooks]'
	@touch $@

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")' \
		&& $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv (once, some minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,notebooks]'
	@touch $@

clean:
	rm -rf .venv .venv-audit $(PARITY) $(LOWEST) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
