# make demo: a first study; make test: lint, types and the tests that a change needs; make test-fast: without Ray and
# servers; make docs: the site, into site/; make test-all: every test that CI runs; make test-cluster: ray up for real; make test-faults: what befalls such
# a cluster; make wheel: what cluster.yaml installs.
# PYTHON names the interpreter (3.11 or newer) that the virtual environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo wheel docs test test-fast test-all test-cluster test-faults lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m klray.tune --space tune_spaces/M.yaml

wheel: $(VENV)/installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# A broken link or reference fails.
docs: $(VENV)/installed-test
	$(BIN)/zensical build --strict --clean

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Of the slow tests one for each mechanism: a killed worker, a pruned study, a pool, MLflow.
test: test-fast
	$(PYTEST) -q -m essential --durations=5

test-all: test-fast
	$(PYTEST) -q -m "slow and not cluster and not faults" --durations=25
	$(MAKE) test-cluster

test-fast: lint docs
	$(PYTEST) -q -m "not slow" -n logical --dist worksteal

# ray up for real, on hosts made of namespaces; needs root, sshd and rsync.
test-cluster: $(VENV)/installed-test
	$(PYTEST) -q -m cluster --durations=5

# Three quarters of an hour. LIBFAKETIME names the library for a wrong clock.
test-faults: $(VENV)/installed-test
	$(PYTEST) -q -m faults --durations=0

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info
