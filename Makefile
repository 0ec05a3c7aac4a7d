# Three commands, each from a bare clone to a result: `make demo`, `make test` and `make test-all`. They share .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_WAIT_POLICY ?= passive

# Two workers on one thread each, which is fastest on two cores; the tests of a file stay together and share what it trains.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-machines lint torture bench docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# Every module.
test: $(READY) lint
	$(PYTEST) -m "not slow"

# The rest: whole documents, launched processes, compilers, large networks.
test-all: $(READY)
	$(PYTEST) -m slow

# The suite under each instruction set that the processor has, on one thread and on two; OPTIONS as in "--only default".
test-machines: $(READY)
	$(BIN)/python tests/machines.py $(OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --kills 50

# Speed and memory against the plain formulas, into benchmarks/results.json and the README; OPTIONS as in "--only angle".
bench: $(READY)
	$(BIN)/python benchmarks/run.py $(OPTIONS)

# The site, into build/site; open build/site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# An environment that was built from the same setup.cfg is used again; a half-built one never carries the stamp.
$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("metric_kd needs Python 3.11 or later; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[cpu,test,tensorboard,pml,docs]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
