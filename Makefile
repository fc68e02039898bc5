# make install: install the package into .venv.
# make demo: install and run the whole method on the embedded model.
# make test: run the tests but those marked `slow`, with a released model (downloaded once, 98 MB).
# make test-all: run the slow ones too.
# make test-real: fetch released checkpoints (1.5 GB) and compare with transformers.
# make docs: build the documentation into build/site.  make notebooks: execute the tutorials again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a CPU build of PyTorch is enough; it is the oracle of the tests and never needed at run time
TORCH ?= torch==2.13.0
# libtpu compiles for TPUs that are not there (200 MB to download, 700 MB installed); its wheels are
# for Linux on x86-64, and jax[tpu] names the version. Without it the tests that compile for a TPU
# are skipped: make test EXTRAS=test
EXTRAS ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),test$(comma)tpu,test)
comma := ,
# unless JAX_PLATFORMS names another platform: with libtpu installed, JAX looks for a TPU first
ON_CPU = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}
# the tests fail if a package of these extras is missing, instead of skipping what needs it
PYTEST = JAXPERSONA_TEST_EXTRAS=$(EXTRAS) $(BIN)/python -m pytest -n 2 --dist loadfile -q

.PHONY: install demo test test-all test-real test-notebooks notebooks docs bench lint clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(ON_CPU) $(BIN)/jaxpersona demo

test: $(VENV)/.installed-test
	$(ON_CPU) $(PYTEST) -m 'not slow and not real'

test-all: $(VENV)/.installed-test
	$(ON_CPU) $(PYTEST) -m 'not real'

test-real: $(VENV)/.installed-test
	$(BIN)/pip install -q -e '.[real]'
	$(BIN)/python -m pytest -q -m real

test-notebooks: $(VENV)/.installed-test $(VENV)/.installed-docs
	$(BIN)/python -m pytest -q tests/test_notebooks.py

notebooks: $(VENV)/.installed-test $(VENV)/.installed-docs
	$(BIN)/python docs/notebooks.py

docs: $(VENV)/.installed-docs
	rm -rf build && $(BIN)/pip install -q --no-deps --target build/types .  # kernels and ckpts mapped
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # --quiet would drop the warnings that strict counts
	@echo build/site/index.html

bench: $(VENV)/.installed-test
	$(BIN)/python bench/suite.py

lint: $(VENV)/.installed-test
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/ruff check .
	rm -rf build && $(BIN)/pip install -q --no-deps --target build/types .  # kernels and ckpts mapped
	$(BIN)/pyright

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
