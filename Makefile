# The Python that makes the virtual environment; everything else runs inside it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint clean

demo: $(STAMP)  ## the whole pipeline on a tiny model, on a CPU
	$(BIN)/rlhf-recipes run tiny

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")' \
		&& $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv (once, some minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,notebooks]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
