VENV = .venv/bin

.PHONY: run test lint stress screenshots bench chaos fuzz

run: .venv/installed
	exec $(VENV)/python -m app.run.supervisor

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

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(VENV)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@
