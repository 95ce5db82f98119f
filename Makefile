# Every target makes its own .venv first; a fresh machine needs Python 3.10 or newer and make.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq $(PIP_ARGS) -c constraints.txt
SOURCES := gen_accel kernels pipelines eval tools tests

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## Run a video pipeline dense and sparse, write outputs/demo/index.html
	$(RUN) -m gen_accel demo

test: $(VENV)/.dev ## Run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: $(VENV)/.dev ## Lint, formatting, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.dev ## Rewrite the sources in the house's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.runtime ## Time one attention call against dense SDPA and FlexAttention
	$(RUN) -m gen_accel bench

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs

# Stamps, so that an environment is made once and again only when its description changes.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with the developer tools (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.runtime
