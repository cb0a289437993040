# Needs Python >= 3.11 with pip, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint notebooks docs package clean

demo: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks demo $(ARGS)

# What a change is most likely to break, in some minutes on two cores. XLA compiles in a hurry: this is about results
# that hold either way. `test-all` leaves nothing out.
CORE := capture/test_flax_nnx capture/test_names capture/test_statistics capture/test_tree errors/test_statistics \
	preconditioners/test_bnp project/test_identity project/test_without_flax training/test_drop_in \
	training/test_drop_in_states training/test_train_state transforms/test_zspace
test: $(VENV)/installed-test
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest --numprocesses auto \
		-m 'not slow' $(CORE:%=tests/%.py) $(ARGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

notebooks: $(VENV)/installed-notebooks
	$(BIN)/python -m pytest notebooks/test_notebooks.py --numprocesses auto --quiet

docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

package: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site
