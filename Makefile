# Every target works as the first command on a fresh clone: it makes .venv, installs into it, and runs.
#   make PYTHON=python3.12 demo     another interpreter (3.11 or newer) for .venv
#   make demo OUT=runs/mine         another run folder
#   make test ARGS="-k config"      more arguments for pytest

PYTHON ?= python3
OUT ?= runs/demo
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Nothing from outside .venv: no user site, no borrowed module path.
export PYTHONNOUSERSITE := 1
export PIP_USER := no
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test slow hostile kill gpu lint picture clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      grow a small model on the Python library sources, evaluate it, show a sample"
	@echo "make test      the tests"
	@echo "make slow      the proofs that take minutes"
	@echo "make kill      500 kills and signals at random instants of every kind of work, in runs/kill (half an hour)"
	@echo "make gpu       the tests that need a GPU, and a table of speed and memory"
	@echo "make hostile   some two thousand damaged and hostile inputs, each answered, none believed"
	@echo "make lint      formatter, linter and type checker"
	@echo "make docs      the documentation, in docs/_build/html; a warning is an error"
	@echo "make dist      the wheel and the sdist, in dist/"
	@echo "make picture   draw the README's picture from $(OUT)"
	@echo "make clean     remove .venv and caches (runs stay)"

demo: $(VENV)/.stamp-core
	$(BIN)/stackwise demo --out $(OUT)

# Two processes of one thread: the tests' tensors are small, and threads that wait for each other double the time.
test: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=3600 $(ARGS)

# What is in runs/kill is gone on with: remove it to begin anew.
kill: $(VENV)/.stamp-dev
	$(BIN)/python tests/kill/harness.py --out runs/kill $(ARGS)

gpu: $(VENV)/.stamp-dev
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS) && $(BIN)/python benchmarks/gpu.py; \
	else echo "make gpu: skipped, there is no GPU"; fi

hostile: $(VENV)/.stamp-dev
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m hostile $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

dist: $(VENV)/.stamp-dev
	$(BIN)/python -m hatchling build -t sdist -t wheel

picture: $(VENV)/.stamp-core
	$(BIN)/stackwise report $(OUT) --out docs/demo.svg

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist docs/_build
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "StackWise needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "Name another interpreter, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e '.[test,lint]'
	@touch $(VENV)/.stamp-core $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e '.[docs]'
	@touch $(VENV)/.stamp-core $@
