# Everything is installed in .venv. The only requirement is Python >= 3.11. The versions are those that constraints.txt has
# for this Python; make check PYTHON=python3.13 VENV=.venv-newer checks the other ones.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo check test attack slow margins size lint clean

help:  ## prints this list
	@grep -hE "^[a-z]+:.*## " $(MAKEFILE_LIST) | sed -E "s/^([a-z]+):.*## /make \1\t/"

# libtpu, which the tests install, prints many messages on machines without a TPU.
demo: export JAX_PLATFORMS ?= cpu
demo: $(VENV)/demo.stamp  ## tunes a small CLIP in a drawn world, with a control, and reports: minutes on two cores
	$(RUN) -m diva_jax.world.demo --out=runs/world

check: $(VENV)/test.stamp lint  ## lint and the unit tests, with PyTorch blocked: at most 90 s on two cores
	PYTHONPATH=tests/support $(RUN) -m pytest -n 2 --dist loadfile --max-worker-restart=0 -p without_torch tests/unit

test: $(VENV)/test.stamp lint  ## the whole test suite, with a fixed sample of attack: at most 15 minutes on two cores
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# Address space is limited, so that a file which asks for too much memory fails a test and not the machine.
attack: $(VENV)/test.stamp  ## every generated case of damaged and hostile input: minutes
	ulimit -v 24000000; $(RUN) -m pytest -m attack

slow: $(VENV)/test.stamp  ## full sweeps and full sizes: an hour
	$(RUN) -m pytest -m slow

margins: $(VENV)/test.stamp  ## every comparison of floats under three instruction sets: error / bound
	$(RUN) tests/support/margins.py -n 2 --dist loadfile $(TESTS)

size:  ## lines of code and what shall exist once, beside their marks
	@$(PYTHON) bench/size.py

lint: $(VENV)/test.stamp  ## style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/test.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[test]"
	touch $@

clean:  ## removes the environment, what the tests compiled and what make demo made, nothing else
	rm -rf $(VENV) .compiled data/tiny runs/tiny runs/tuned runs/world
