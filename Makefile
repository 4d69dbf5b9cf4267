# `make demo` and `make test` set up a fresh machine, with the same files on every one:
# requirements/*.txt pin versions and hashes, and `make lock` renews them.
PYTHON ?= python3
VENV ?= .venv
# Not locked: the package index decides which build of this version a machine gets, for a GPU or not.
TORCH ?= torch==2.13.0
JOBS ?= 2
# Further arguments of pytest, for example TESTS="tests/test_cli.py".
TESTS ?=
# Packages that `make newest` installs beyond the bounds, for example PINS="transformers==5.25.0".
PINS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --no-deps --require-hashes --requirement
# Each worker begins with a run of whole files, so that their fixtures are made once; who is done
# early takes over some of the rest.
PYTEST := -m pytest -n $(JOBS) --dist worksteal
# Environments that override some packages of the first one.
LOWEST := $(VENV)-lowest
NEWEST := $(VENV)-newest
KERNELS := $(VENV)-kernels
DOCS := $(VENV)-docs
DIST := $(VENV)-dist

.PHONY: demo test thorough families kernels check lowest newest lint types results tables docs dist lock clean

demo: $(VENV)/installed
	$(BIN)/cmoe demo demo --overwrite

# All tests but the long ones.
test: $(VENV)/installed-dev
	$(BIN)/python $(PYTEST) -m "not thorough and not families" $(TESTS)
	@echo "Tests marked thorough (trainings, killed and parallel processes) run with \`make thorough\`."

# The long tests.
thorough: $(VENV)/installed-dev
	$(BIN)/python $(PYTEST) -m thorough $(TESTS)

# Carve a small model of every family that transformers has; build/families.json says what became
# of each.
families: $(VENV)/installed-dev
	$(BIN)/python -m pytest -s -m families tests/test_every_family.py

# The kernels for GPUs by Triton's interpreter, which needs none. Triton takes 1 GB of the disk, and
# torch for CUDA pins one by itself: it has a folder of its own.
kernels: $(KERNELS)/installed
	TRITON_INTERPRET=1 PYTHONPATH=$(abspath $(KERNELS)) $(BIN)/python -m pytest -n 0 tests/test_triton.py

check: lint types test thorough kernels lowest

# The tests that depend on transformers, with the lowest supported version.
lowest: $(LOWEST)/installed
	PYTHONPATH=$(abspath $(LOWEST)) $(BIN)/python $(PYTEST) -m "library and not thorough" $(TESTS)

# The same tests with the newest versions that pyproject.toml allows, if any is newer than the locks;
# the closing line names what is newer than the bounds.
newest: $(VENV)/installed-dev
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	echo "$(abspath $(VENV))"/lib/python*/site-packages > $$(echo $(NEWEST)/lib/python*/site-packages)/locked.pth
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	    --upgrade-strategy eager --editable '.[eval,gguf,quantise,report,serve,train]' "$(TORCH)"
	$(if $(PINS),$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PINS))
	@status=0; \
	if ls $(NEWEST)/lib/python*/site-packages | grep 'dist-info$$' | grep -vE '^(cmoe_hf|pip|setuptools)-'; then \
	    $(NEWEST)/bin/python $(PYTEST) -m "library and not thorough" $(TESTS) || status=$$?; \
	else \
	    echo "Nothing that the package needs is newer than the locks."; \
	fi; \
	$(BIN)/python requirements/beyond.py; exit $$status

# Write the tables of the pages from results/*.json.
results:
	$(PYTHON) results/tables.py

# Run the commands of the tables again, an hour on two cores, and say which figures changed;
# DATA is a folder with SmolLM2, llama-7m and wikitext2, without which their tables are left out.
tables: $(VENV)/installed-dev
	$(BIN)/python results/rerun.py $(if $(DATA),--data $(DATA))

# Build the documentation in build/site; a broken link is an error.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet
	@echo "build/site/index.html"

# Build a source archive and a wheel, and run the demo from the wheel alone.
dist: $(VENV)/installed-dev
	rm -rf build/lib dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(PYTHON) -m venv --clear $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	echo "$(abspath $(VENV))"/lib/python*/site-packages > $$(echo $(DIST)/lib/python*/site-packages)/locked.pth
	cd dist && HF_HUB_OFFLINE=1 $(abspath $(DIST))/bin/cmoe --version
	cd dist && HF_HUB_OFFLINE=1 $(abspath $(DIST))/bin/cmoe demo

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# torch last: all that it needs, apart from GPU libraries, is locked and installed by then.
$(VENV)/installed: requirements/demo.txt pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements/demo.txt
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/installed-dev: requirements/dev.txt $(VENV)/installed
	$(LOCKED) requirements/dev.txt
	touch $@

$(DOCS)/installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	    --requirement requirements/docs.txt
	touch $@

$(LOWEST)/installed: requirements/lowest.txt $(VENV)/installed-dev
	rm -rf $(LOWEST)
	$(LOCKED) requirements/lowest.txt --target $(LOWEST)
	touch $@

$(KERNELS)/installed: requirements/triton.txt $(VENV)/installed-dev
	rm -rf $(KERNELS)
	$(LOCKED) requirements/triton.txt --target $(KERNELS)
	touch $@

# Lock the newest versions within the bounds of pyproject.toml, with the hashes of all their files.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	rm -f requirements/dev.txt requirements/demo.txt requirements/lowest.txt \
	    requirements/docs.txt requirements/triton.txt
	$(COMPILE) pyproject.toml --extra dev --output-file requirements/dev.txt requirements/build.in
	$(COMPILE) pyproject.toml --constraint requirements/dev.txt --output-file requirements/demo.txt \
	    requirements/build.in
	$(COMPILE) --group docs --output-file requirements/docs.txt
	echo "transformers==5.16.0" | $(COMPILE) --output-file requirements/lowest.txt -
	echo "triton; sys_platform == 'linux'" | $(COMPILE_ALL) --output-file requirements/triton.txt -

COMPILE = $(COMPILE_ALL) --excludes requirements/gpu.txt
COMPILE_ALL = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --no-annotate --no-header --no-emit-package torch

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(KERNELS) $(DOCS) $(DIST) .venv-lock build dist *.egg-info
