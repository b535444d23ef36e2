# Each target sets up .venv by itself, and again when setup.cfg, pyproject.toml or constraints.txt have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

# Compiled programs are kept between runs, in a folder that git ignores.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# Two files of tests at a time; more need more memory than many machines have.
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run explore test check bench lint

help:
	@echo "make run      train KDSR on the embedded planted shop into runs/planted, and print its metrics"
	@echo "make explore  look at that run in the browser, beside one on item ids alone"
	@echo "make test     lint, then all tests but the slow ones"
	@echo "make check    the slow tests"
	@echo "make bench    measure speed and memory into benchmarks/latest.json and docs/performance.md; BENCH_DATA=PATH: Beauty as well"
	@echo "make lint     check style and formatting"
	@echo "PYTHON=...    the Python 3.11 or newer that .venv is made with (now $(PYTHON))"

run: $(STAMP)
	$(BIN)/python -m kdsr_jax.main --config=configs/planted.py --workdir=runs/planted

explore: $(STAMP) runs/planted/result.json runs/planted-ids/result.json
	$(BIN)/python -m kdsr_jax.explore --workdir=runs/planted --compare=runs/planted-ids

# Finished runs are not trained again.
runs/planted/result.json: | $(STAMP)
	$(BIN)/python -m kdsr_jax.main --config=configs/planted.py --workdir=$(@D)

runs/planted-ids/result.json: | $(STAMP)
	$(BIN)/python -m kdsr_jax.main --config=configs/planted.py:sasrec --workdir=$(@D)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

check: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m slow

bench: $(STAMP)
	$(BIN)/python -m experiments.bench
ifdef BENCH_DATA
	$(BIN)/python -m experiments.bench --datasets=beauty --no-startup --config.data.root=$(BENCH_DATA)
endif

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kdsr-jax needs Python 3.11 or newer; choose one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
