# make demo: install, then draw the gallery with the shipped weights.   make test: install with the development extras, then test.
# make lint, make chaos, make lock (remake the locks), make sbom (what it is made of), make clean. Nothing is needed but make and Python >= 3.11.

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test lint chaos lock sbom clean
.DELETE_ON_ERROR:

demo: .venv/base.stamp
	$(BIN)/reverie demo

# One thread: the tests' tensors are small, and a second costs more than it brings.
test: lint
	OMP_NUM_THREADS=1 $(PYTEST)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

chaos: .venv/dev.stamp
	$(PYTEST) -m "chaos or hostile"

.venv/base.stamp: requirements/lock.txt requirements/torch.txt pyproject.toml requirements/install
	requirements/install requirements/lock.txt
	touch $@

.venv/dev.stamp: requirements/lock-dev.txt requirements/torch.txt pyproject.toml requirements/install
	requirements/install requirements/lock-dev.txt
	touch $@

lock:
	requirements/lock

sbom:
	requirements/sbom

clean:
	rm -rf .venv build dist gallery src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
