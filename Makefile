VENV = .venv/bin
PYTHON = python3
PIP = $(VENV)/pip install --quiet --disable-pip-version-check --requirement

.PHONY: run test lint stress screenshots bench chaos fuzz

run: .venv/installed
	@exec $(VENV)/python -m app.run.supervisor

test: .venv/installed-dev
	$(VENV)/python -m pytest

lint: .venv/installed-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

stress: .venv/installed
	$(VENV)/python stress/stress_test.py
	$(VENV)/python stress/rate_limit_test.py
	$(VENV)/python stress/idempotency_test.py

screenshots: .venv/installed-dev
	$(VENV)/python stress/screenshots.py

# make chaos args="--kills 500 --seed 1", or --minutes 10
chaos: .venv/installed
	$(VENV)/python stress/chaos.py $(args)

fuzz: .venv/installed
	$(VENV)/python stress/fuzz.py $(args)

# Granian, its ceiling, is a development requirement.
bench: .venv/installed-dev
	$(VENV)/python stress/bench.py

# Always made anew as a whole, so that one that was cut short, or of another Python, does no harm.
.venv/installed: requirements.txt .venv/bin/python
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or later is needed, and $(PYTHON) is %d.%d; if there is another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing the packages into .venv: about half a minute, this once"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) requirements.txt
	@touch $@

# Missing, or its Python is gone: the rule above makes it.
.venv/bin/python: ;

.venv/installed-dev: requirements-dev.txt .venv/installed
	@echo "Installing what tests and benchmarks need"
	@$(PIP) requirements-dev.txt
	@touch $@
