# make nightly   the whole path on the example data: catalogue, training, evaluation, tonight's blocklists
# make test      the tests
# Both make .venv from requirements/cpu.txt the first time. Needs Python 3.11 and nothing else.

PYTHON ?= python3.11
CONFIG ?= examples/kuairand/conrec.toml
VENV := .venv/complete

.PHONY: nightly test lint types lock clean python

nightly: $(VENV)
	@.venv/bin/conrec run --config $(CONFIG)

# Two processes: the tests that start Ray wait most of the time. Ray's workers run at nice 15 unless they are told.
test: $(VENV)
	@mkdir -p build; \
	RAY_worker_niceness=0 .venv/bin/python -m pytest -q -m ray > build/tests-ray.log 2>&1 & ray=$$!; \
	trap "kill $$ray 2>/dev/null" EXIT INT TERM; \
	RAY_worker_niceness=0 .venv/bin/python -m pytest -q -m "not ray"; others=$$?; \
	echo "and the tests that start Ray (build/tests-ray.log):"; \
	wait $$ray; ray=$$?; cat build/tests-ray.log; exit $$((others || ray))

lint: $(VENV)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: $(VENV)
	@.venv/bin/mypy

lock: | python
	@$(PYTHON) requirements/environment.py lock

clean:
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(VENV): requirements/cpu.txt requirements/environment.py pyproject.toml | python
	@$(PYTHON) requirements/environment.py install

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	    echo "conrec needs Python 3.11, and $(PYTHON) is not it. Install Python 3.11, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	    exit 2; }
