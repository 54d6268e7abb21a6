# Everything starts from a fresh checkout with Python 3.11 (or later) and make:
#
#   make demo        train the digits network in both libraries; table, results.json and figure. LIBRARY=numpyro, or
#                    pyro: in one. It installs the libraries that it trains and what it draws with; all other targets
#                    install what development needs, too
#   make test        the tests, those marked slow left out: under ten minutes on two idle cores
#   make test-all    all tests: every estimator in every program, notebooks, examples and the demo to their end
#   make programs    300 random programs in both libraries against exact sums; PROGRAMS="--first 300" for others
#   make benchmarks  the speed and variance tables of the docs
#   make docs        the generated pages, and the site in build/docs; NOTEBOOKS=force runs the tutorials anew
#   make figures     the figures of the docs, drawn again from benchmarks/results
#   make versions    a small set of tests by the lowest and the newest versions of JAX and NumPyro
#   make lint        ruff: rules and format; mypy
#   make clean       remove what the targets above made, the virtual environment too
#
# All paths are relative, so the checkout may lie under a folder with spaces in its name.

VENV   := .venv
PY     := $(VENV)/bin/python
LIBRARY ?= both
DEMO_STAMP := $(VENV)/.demo-$(LIBRARY)
STAMP  := $(VENV)/.installed
COMMA := ,
DEMO     ?=
PYTEST   ?=
PROGRAMS ?=

.PHONY: help demo test test-all programs benchmarks docs figures versions lint clean

help:
	@sed -n 's/^#   make/  make/p' Makefile

demo: $(DEMO_STAMP)
	$(PY) -m ppl_estimators.cli demo --backend $(LIBRARY) $(DEMO)

# Two workers with one thread each: the suite is made of many small computations. What `test` leaves out shows nothing
# about the code that the rest does not; tests/mutations.md has the proof.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(PYTEST)

programs: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m programs $(PROGRAMS)

benchmarks: $(STAMP)
	@for script in benchmarks/[!_]*.py; do \
		echo "== $$script"; $(PY) "$$script" || exit 1; \
	done

docs: $(STAMP)
	$(PY) docs/make_estimators.py
	$(PY) docs/make_api.py
	$(PY) docs/make_tables.py
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "The site is build/docs/index.html"

figures: $(STAMP)
	$(PY) docs/make_figures.py

# By other versions than those of constraints.txt: the lowest and the newest that pyproject.toml allows.
versions: $(STAMP)
	$(PY) .ci/versions.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist demo-results .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made afresh whenever a declared dependency or a pin changes. A stamp is written last, so an
# interrupted installation is never mistaken for a finished one; what serves development serves the demo.
$(VENV)/pyvenv.cfg: pyproject.toml constraints.txt
	@for python in python3.11 python3 python; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
			&& exec "$$python" -m venv --clear $(VENV); \
	done; \
	echo "make: Python 3.11 or later is needed, and none was found on the PATH" >&2; exit 1

$(DEMO_STAMP): $(VENV)/pyvenv.cfg
	$(PY) -m pip install --no-compile -c constraints.txt -e ".[$(if $(filter both,$(LIBRARY)),pyro$(COMMA)numpyro,$(LIBRARY))$(COMMA)demo]"
	@touch $@

$(STAMP): $(VENV)/pyvenv.cfg
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.demo-both $(VENV)/.demo-pyro $(VENV)/.demo-numpyro $@
