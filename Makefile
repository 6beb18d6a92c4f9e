# make lab     install into .venv and open the tour in JupyterLab
# make test    install, then lint, check types and run the tests
# make help    everything else

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=
# More for pip, for example PIP_ARGS="--extra-index-url URL" with the index of CPU wheels that pytorch.org names.
PIP_ARGS ?=
# One thread a worker: with more, two workers fight over the cores and sums differ from run to run.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
INSTALLED := $(VENV)/.installed
# Threads that wait must sleep: spinning ones make a probe five to seven times slower whenever the cores are shared.
OMP_WAIT_POLICY ?= PASSIVE
export PYTHON OMP_WAIT_POLICY

.PHONY: help lab test install system lint format types pytest slow demo bench pages clean distclean

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: install  ## install and open the tour in JupyterLab (ARGS="--no-browser" and the like are passed on)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_tour.ipynb $(ARGS)

test: install system lint types pytest  ## install what is missing, lint, check types, run the tests

install: $(INSTALLED)  ## make .venv and install Workbench with everything its tests need

# Done again only when the requirements change. The constraints matter: without them pip may choose another torch.
$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(tools/python.sh) || exit 1; \
	if [ ! -x $(BIN)/python ]; then \
		tools/debian.sh venv "$$python" && echo "Making $(VENV) with $$("$$python" --version)" && "$$python" -m venv $(VENV); \
	fi
	@echo "Installing (the first time takes minutes: torch is large)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

system: install
	@PLAYWRIGHT=$(BIN)/playwright tools/debian.sh test

lint: install  ## style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: install  ## let ruff repair and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## pyright, strict, on the package
	$(BIN)/pyright --pythonpath $(BIN)/python

# By files: the steps of a browser test follow one another, and what a module prepares is prepared once.
pytest: install  ## the tests alone (ARGS="-k store" and the like are passed on)
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

slow: install system  ## the tests that take minutes or want a GPU
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or gpu" $(ARGS)

demo: install  ## train, probe and write a report folder, without a browser
	$(BIN)/workbench demo $(ARGS)

bench: install  ## what a user waits for; spectra and landscapes against exact values and peers (results in benchmarks/results)
	$(BIN)/python benchmarks/responsiveness.py
	$(BIN)/python benchmarks/spectrum.py
	$(THREADS) $(BIN)/python benchmarks/crosscheck.py
	$(THREADS) $(BIN)/python benchmarks/coverage.py
	$(THREADS) $(BIN)/python benchmarks/noise_intervals.py
	$(THREADS) $(BIN)/python benchmarks/curvature.py
	$(THREADS) $(BIN)/python benchmarks/landscape.py
	$(THREADS) $(BIN)/python benchmarks/adaptive.py
	$(THREADS) $(BIN)/python benchmarks/collapse.py
	$(THREADS) $(BIN)/python benchmarks/kernel.py
	$(THREADS) $(BIN)/python benchmarks/recorder.py
	$(THREADS) $(BIN)/python benchmarks/experiments.py

pages: install  ## write docs/measures/ anew after a probe's words, settings or variables changed
	$(BIN)/python -m workbench.catalog docs/measures

clean:  ## remove caches and builds
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)
