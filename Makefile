# Each target creates the environment that it needs; `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# jax2onnx and the other tests need different versions of orbax.
VENV_ONNX ?= .venv-onnx
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))
# This trains many networks, which takes as long as all other notebooks.
LONG = notebooks/choosing_a_norm.ipynb
# The compilers for TPU and GPU, one environment each: downloads of half a gigabyte each.
VENV_TPU ?= .venv-tpu
VENV_GPU ?= .venv-gpu
CUDA_COMPILER = jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12
# A gigabyte of other libraries, and models of up to a gigabyte each.
VENV_ZOO ?= .venv-zoo
# The lowest versions that pyproject.toml allows, and the newest jax, which needs a newer Python.
VENV_LOWEST ?= .venv-lowest
VENV_NEWEST ?= .venv-newest
NEWEST_PYTHON ?= python3.13
VERSIONED ?= tests jaxnorm
# The tests that are neither slow nor exhaustive; pyproject.toml says what these are.
FAST = not slow and not exhaustive
# The examples of these files need PyTorch, which is not installed there either.
VERSIONED += $(addprefix --ignore=jaxnorm/interop/, _describe.py _kernels_of.py _match.py _to_torch.py)
# The tests that run for the formulations of TPU and GPU, whose moments differ: those of accuracy, and
# of devices that pool their moments. `tests/test_platforms.py` has their derivatives and masks.
FORMULATED = $(addprefix tests/test_, moments.py functional.py functional_stateless.py extremes.py) \
  tests/test_devices.py::test_any_split_over_devices_is_the_whole_batch
FORMULATION = -m "$(FAST)" -k "not bad_input and not pytorch and not export and not symbolic" --formulation
# A GPU's formulation has one collective more; the other tests of collectives allow for it.
COLLECTIVES = $(addprefix tests/test_devices.py::test_one_collective_, forward_and_none_where_none_is_needed \
  each_way_in_training each_way_for_a_norm_whose_sample_is_spread)
# The tests that also run as XLA compiles by default, for the bits that users get.
OPTIMIZED = $(addprefix tests/test_, moments.py extremes.py compiled.py)

.PHONY: help demo test test-slow test-onnx lint notebooks docs test-site package bench bench-full \
  test-accelerators test-exhaustive bench-accelerators test-colab test-versions test-zoo coverage mutants
help:
	@echo "make demo   train a small network on scanned digits without a norm, with batch and with instance norm; writes digits/*.png"
	@echo "make test   run the tests except the slow ones"
	@echo "make test-slow   run the slow tests and the notebooks, and some others with the formulations for TPU and GPU and with optimized programs"
	@echo "make test-onnx   run the tests of the export to ONNX"
	@echo "make test-colab   install the package as the notebooks' first cells do, and test that nothing is replaced"
	@echo "make test-zoo   convert the state dicts of other libraries' models, and compare the examples; writes docs/interop_zoo.md"
	@echo "make test-versions   run the tests with the lowest and the newest versions, without other libraries"
	@echo "make coverage   measure which code of jaxnorm the fast tests run, without ONNX and with it"
	@echo "make mutants   change the moments, the normalization and the update in 200 ways, and list what the tests miss"
	@echo "make lint   check format, style, spelling and types"
	@echo "make notebooks   write notebooks/*.ipynb from notebooks/*.py, and run those that have changed"
	@echo "make package   build the sdist and the wheel, check their metadata, and try both in an empty environment"
	@echo "make docs   build the documentation in build/site"
	@echo "make test-site   build the documentation, and test its links, signatures, search and width"
	@echo "make bench  measure the norms of every library in one run; writes docs/benchmarks"
	@echo "make test-accelerators   compile norms for TPU and GPU, with no device, and compare with Flax"
	@echo "make test-exhaustive   run the tests that no other target runs, because they take long and repeat what others check"
	@echo "make bench-accelerators   estimates of the compilers for TPU and GPU for norms and training steps"
	@echo "make bench-full   every size, dtype and layout; continues where it was stopped"

demo: $(VENV)/with-examples
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/with-test
	$(BIN)/pytest -m "$(FAST)" --numprocesses auto

test-slow: $(VENV)/with-test
	$(BIN)/pytest -m slow --numprocesses auto
	$(BIN)/pytest --nbmake $(filter-out %/from_pytorch.ipynb $(LONG), $(NOTEBOOKS)) --numprocesses auto
	$(BIN)/pytest $(FORMULATION) tpu --numprocesses auto $(FORMULATED) $(COLLECTIVES)
	$(BIN)/pytest $(FORMULATION) cuda --numprocesses auto $(FORMULATED)
	$(BIN)/pytest -m "$(FAST)" --optimized --numprocesses auto $(OPTIMIZED)

# Tests that need a missing library are skipped, and counted at the end. The newest jaxlib
# may lack the flags for fast compilation, and would refuse to start with them.
test-versions: $(VENV_LOWEST)/with-test-versions
	$(VENV_LOWEST)/bin/pip list --format freeze | grep -E "^(jax|jaxlib|flax|numpy)="
	$(VENV_LOWEST)/bin/pytest -m "$(FAST)" -r fE --doctest-ignore-import-errors --numprocesses auto $(VERSIONED)
ifneq ($(shell $(NEWEST_PYTHON) --version 2>/dev/null),)
	$(MAKE) $(VENV_NEWEST)/with-test-versions
	$(VENV_NEWEST)/bin/pip list --format freeze | grep -E "^(jax|jaxlib|flax|numpy)="
	$(VENV_NEWEST)/bin/pytest -m "$(FAST)" --optimized -r fE --doctest-ignore-import-errors --numprocesses auto $(VERSIONED)
else
	@echo "There is no $(NEWEST_PYTHON) here: the versions for it were not tested."
endif

# This creates a new environment like that of a notebook service each time.
test-colab: $(VENV)/with-test
	$(BIN)/pytest tests_colab

test-zoo: $(VENV_ZOO)/with-zoo
	$(VENV_ZOO)/bin/pytest tests_zoo -rsf $(ARGS)

# The lowest share of the statements, in percent. The tests of ONNX add what they run.
COVERED ?= 95
coverage: $(VENV)/with-test $(VENV_ONNX)/with-test-onnx
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "$(FAST)" --numprocesses auto
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --omit 'jaxnorm/onnx/*' --fail-under $(COVERED)
	$(VENV_ONNX)/bin/coverage run -m pytest tests_onnx --numprocesses auto
	$(BIN)/coverage combine --quiet --append
	$(BIN)/coverage report --fail-under $(COVERED)

# This continues where it was stopped; `rm -r build/mutants` begins again.
mutants: $(VENV)/with-test
	$(BIN)/python tests/mutants.py $(ARGS)

# Runs those whose code or version has changed; ARGS names others to run.
notebooks: $(VENV)/with-test $(VENV_ONNX)/with-test-onnx
	ONNX_PYTHON=$(abspath $(VENV_ONNX)/bin/python) $(BIN)/python docs/site/notebooks.py $(ARGS)

test-onnx: $(VENV_ONNX)/with-test-onnx
	$(VENV_ONNX)/bin/pytest tests_onnx --numprocesses auto

lint: $(VENV)/with-test $(VENV)/with-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

# The wheel is installed by name, from an index that has it alone, and brings what it needs into an
# empty environment; the sdist takes its place there.
package: $(VENV)/with-dev
	rm -rf dist build/package build/index
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/package
	mkdir -p build/index/jaxnorm
	cp dist/*.whl build/index/jaxnorm
	cd build/index/jaxnorm && printf '<a href="%s"></a>\n' *.whl > index.html
	build/package/bin/pip install --quiet --disable-pip-version-check --extra-index-url file://$(CURDIR)/build/index jaxnorm
	cp tests/smoke.py build/package
	cd build/package && bin/python smoke.py ../../jaxnorm
	build/package/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.tar.gz
	cd build/package && bin/python smoke.py ../../jaxnorm

docs: $(VENV)/with-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# CHROMIUM is the browser; without one the search and the widths are not tested.
test-site: docs
	$(BIN)/pytest tests_site

bench: $(VENV)/with-bench
	$(BIN)/python benchmarks/norms.py $(ARGS)

bench-full: $(VENV)/with-bench
	$(BIN)/python benchmarks/norms.py --full $(ARGS)

test-accelerators: $(VENV_TPU)/with-accelerators-tpu $(VENV_GPU)/with-accelerators-gpu
	$(VENV_TPU)/bin/pytest tests_accelerators -m "not exhaustive"
	$(VENV_GPU)/bin/pytest tests_accelerators -m "not exhaustive"

test-exhaustive: $(VENV)/with-test $(VENV_ONNX)/with-test-onnx $(VENV_TPU)/with-accelerators-tpu $(VENV_GPU)/with-accelerators-gpu
	$(BIN)/pytest tests -m exhaustive --numprocesses auto
	$(BIN)/pytest --nbmake $(LONG)
	$(VENV_ONNX)/bin/pytest --nbmake notebooks/from_pytorch.ipynb
	$(VENV_TPU)/bin/pytest tests_accelerators -m exhaustive
	$(VENV_GPU)/bin/pytest tests_accelerators -m exhaustive

bench-accelerators: $(VENV)/with-bench $(VENV_TPU)/with-accelerators-tpu $(VENV_GPU)/with-accelerators-gpu
	TPU_PYTHON=$(VENV_TPU)/bin/python GPU_PYTHON=$(VENV_GPU)/bin/python \
	  $(BIN)/python benchmarks/accelerators.py $(ARGS)

define environment
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]'
@touch $@
endef

$(VENV)/with-%: pyproject.toml
	$(environment)

$(VENV_ONNX)/with-%: pyproject.toml
	$(environment)

$(VENV_LOWEST)/with-%: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(PYTHON) tests/lowest.py examples interop > $(@D)/lowest.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]' --constraint $(@D)/lowest.txt
	@touch $@

$(VENV_NEWEST)/with-%: PYTHON = $(NEWEST_PYTHON)
$(VENV_NEWEST)/with-%: pyproject.toml
	$(environment)

$(VENV_ZOO)/with-%: pyproject.toml tests_zoo/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]' --constraint tests_zoo/constraints.txt
	@touch $@

$(VENV_TPU)/with-%: pyproject.toml
	$(environment)

$(VENV_GPU)/with-%: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps $(CUDA_COMPILER)
	@touch $@
