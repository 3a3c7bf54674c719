# Each target makes the environment that it needs; `make` says what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# jax2onnx and the other tests need different versions of orbax.
VENV_ONNX ?= .venv-onnx
VENV_DOCS ?= .venv-docs
# Whether `make docs` runs the notebooks.
EXECUTE ?= true

.PHONY: help demo test test-onnx lint docs bench bench-full
help:
	@echo "make demo   train a small network with each norm on scanned digits; writes digits/*.png"
	@echo "make test   run the whole test suite"
	@echo "make test-onnx   run the tests of the export to ONNX"
	@echo "make lint   check format, style and types"
	@echo "make docs   build the documentation in build/site; EXECUTE=false leaves the notebooks unrun"
	@echo "make bench  measure the norms of every library in one run; writes docs/benchmarks"
	@echo "make bench-full   every size, dtype and layout; goes on where it was stopped"

demo: $(VENV)/with-examples
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/with-test
	$(BIN)/pytest --numprocesses auto

test-onnx: $(VENV_ONNX)/with-test-onnx
	$(VENV_ONNX)/bin/pytest tests_onnx --numprocesses auto

lint: $(VENV)/with-test $(VENV)/with-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV_DOCS)/with-docs
	EXECUTE=$(EXECUTE) NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

bench: $(VENV)/with-bench
	$(BIN)/python benchmarks/norms.py $(ARGS)

bench-full: $(VENV)/with-bench
	$(BIN)/python benchmarks/norms.py --full $(ARGS)

define environment
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]'
@touch $@
endef

$(VENV)/with-%: pyproject.toml
	$(environment)

$(VENV_ONNX)/with-%: pyproject.toml
	$(environment)

$(VENV_DOCS)/with-%: pyproject.toml
	$(environment)
