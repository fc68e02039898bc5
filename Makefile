# make demo: install and run the whole method on the embedded model.  make test: run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a CPU build of PyTorch is enough; it is the oracle of the tests and never needed at run time
TORCH ?= torch==2.13.0

.PHONY: demo test bench lint clean

demo: $(VENV)/.installed
	$(BIN)/jaxpersona demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

bench: $(VENV)/.installed-test
	$(BIN)/python bench/suite.py

lint: $(VENV)/.installed-test
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
