# make demo: GLARE end to end on built-in scenes     make test: all tests     make check: lint, format, types
# make bench: images a second of pre-training, beside the way of research code, some minutes on two cores
# make versions: the tests with the oldest and with the newest dependencies allowed, each in an environment of its own
# Each of the others creates .venv and installs into it first; another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check bench versions clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/glare demo --output runs/demo

# One thread a process: small tensors gain nothing from more, and the two test processes share two cores.
# worksteal: neighbouring tests stay in one process, which builds what they share once.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/glare bench --json bench.json

# Many minutes; the oldest torch brings several GB of CUDA packages where no index has a CPU build of it.
versions:
	PYTHON=$(PYTHON) .ci/versions

clean:
	rm -rf .venv build dist bench.json src/*.egg-info .mypy_cache .ruff_cache .pytest_cache

# Without the constraints pip would take the newest torch, with several GB of CUDA packages, on any machine.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; found = sys.version.split()[0]; \
	sys.exit(0 if sys.version_info >= (3, 11) else \
	f"Python 3.11 or newer is needed, $(PYTHON) is {found}; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, which takes some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
