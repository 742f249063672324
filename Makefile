# make nightly   the whole path on the example data, in minutes: catalogue, training, evaluation, tonight's blocklists
# make example-full   the same with all of the method: both trainings, every user (CONFIG=my.toml: your own data)
# make test      the tests
# make quick     lint, types, and the tests that start nothing: a minute and a half; ROOM=feedback: the tests of one room
# make lint      style and format
# make types     the types of the whole tree
# make lock      the lock files anew, from pyproject.toml
# make clean     removes what was built, .venv and runs/ included
# make help      these lines; make alone is make nightly
# Those that need .venv make it from requirements/cpu.txt the first time, with the first of these that runs, or with
# make PYTHON=/path/to/python3.12 ... They need nothing else.

PYTHONS := python3.11 python3.12 python3.13
PYTHON ?= $(shell for one in $(PYTHONS); do if $$one -c '' >/dev/null 2>&1; then echo $$one; break; fi; done)
CONFIG ?= examples/kuairand/conrec.toml
VENV := .venv/complete

.PHONY: nightly example-full test quick lint types lock clean help python

nightly: $(VENV)
	@.venv/bin/conrec run --config examples/kuairand/quick.toml

example-full: $(VENV)
	@.venv/bin/conrec run --config $(CONFIG)

# Three processes of one thread each: the tests that start Ray wait most of the time. The first holds what starts a Ray of
# its own again and again, and two rooms, so that all end together; the second, whose files are found by their mark,
# shares one Ray: to collect all files for a dozen tests takes it 17 s. A hundred processes read the byte code that one of
# them has written, Ray's workers do not run at nice 15, and nothing is measured for a dashboard that does not run.
KILLS := tests/test_nightly_kill.py tests/blocklist/test_generate.py
FIRST := $(KILLS) tests/store tests/serving
RAYS = $(filter-out $(FIRST) $(FIRST:%=%/%),$(shell grep -rl --include='test_*.py' 'mark\.ray' tests))
RAY := RAY_worker_niceness=0 RAY_enable_metrics_collection=0 RAY_USAGE_STATS_ENABLED=0
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RAY) .venv/bin/python -m pytest -q

test: $(VENV)
	@mkdir -p build; \
	$(PYTEST) $(FIRST) > build/tests-kill.log 2>&1 & kill=$$!; \
	$(PYTEST) -m ray $(RAYS) > build/tests-ray.log 2>&1 & ray=$$!; \
	trap "kill $$kill $$ray 2>/dev/null" EXIT INT TERM; \
	$(PYTEST) -m "not ray" $(FIRST:%=--ignore=%); others=$$?; \
	echo "and those of the two others (build/tests-kill.log, build/tests-ray.log):"; \
	wait $$kill; kill=$$?; wait $$ray; ray=$$?; \
	cat build/tests-kill.log build/tests-ray.log; exit $$((others || kill || ray))

ROOM ?=
HALF := tests/blocklist tests/serving tests/store tests/catalogue tests/policy

# Two halves of the tests at once, the types beside them.
QUICK := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m "not long and not ray"

quick: lint
	@mkdir -p build; \
	(if [ -n "$(ROOM)" ]; then $(QUICK) tests/$(ROOM); else $(QUICK) $(HALF); fi) > build/quick.log 2>&1 & half=$$!; \
	trap "kill $$half 2>/dev/null" EXIT INT TERM; \
	types=0; .venv/bin/mypy || types=1; \
	rest=0; [ -n "$(ROOM)" ] || $(QUICK) $(HALF:%=--ignore=%) || rest=1; \
	wait $$half; half=$$?; cat build/quick.log; exit $$((types || rest || half))

lint: $(VENV)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: $(VENV)
	@.venv/bin/mypy

lock: | python
	@$(PYTHON) requirements/environment.py lock

clean:
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

help:
	@sed -n 's/^# \(make [a-z-]* .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

$(VENV): requirements/cpu.txt requirements/environment.py pyproject.toml | python
	@$(PYTHON) requirements/environment.py install

python:
	@$(or $(PYTHON),false) requirements/environment.py check 2>/dev/null || { \
	    echo "conrec needs one of $(PYTHONS), and $(or $(PYTHON),what is in PATH) is none. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	    exit 2; }
