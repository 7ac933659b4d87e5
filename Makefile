# Each target works on a fresh clone: the first one that runs makes the virtual environment and installs the package into it.
#   make demo    train Mask R-CNN from random weights on drawn images, evaluate, draw
#   make test    notebooks in sync and executed, tests, documentation: what CI runs
#   make docs    the site, in _docs/
#   make slow    the tests that take a minute each
#   make long    the tests that take many minutes: tutorials as written, pages on real images, all benchmarks
#   make bench   all benchmarks that this machine can run, into results/: about twenty minutes on two cores
#   make fuzz    100,000 lying inputs; make fuzz INPUTS=1000000 for a night
#   make install only the environment
#   make help    all targets; make clean leaves .venv/ and demo/ as they are
# make VENV=/somewhere/else PYTHON=python3.12 test   uses another environment and interpreter

SHELL := /bin/bash
VENV ?= .venv
DEMO ?= demo
JOBS ?= 2
INPUTS ?= 100000
STAMP := $(VENV)/.scratchdet
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONUNBUFFERED := 1

USABLE := import ensurepip, sys, venv; assert (3, 10) <= sys.version_info < (3, 13)
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.10; do \
	$$p -c '$(USABLE)' 2>/dev/null && { echo $$p; break; }; done)
NOTEBOOKS = $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path '*/_*' | sort)

.PHONY: help install demo test sync notebooks pytest slow long bench fuzz docs docs-check export readme clean

help:
	@sed -n 's/^#  *make/make/p' Makefile
	@echo 'parts of make test: make sync, make notebooks, make pytest, make docs-check'
	@echo 'after an edit: make export, make readme; to start afresh: make clean'

$(STAMP): settings.ini setup.py pyproject.toml
	@[ -x $(VENV)/bin/python ] || [ -n "$(PYTHON)" ] || { \
		echo 'No Python 3.10, 3.11 or 3.12 with venv found: install one (Debian: python3-venv), or make PYTHON=/path/to/python3.12' >&2; exit 1; }
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@echo 'installs all that is needed into $(VENV): some minutes'
	python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} bash recipes/demo.sh $(DEMO)
	python -m scratchdet.predict --weights $(DEMO)/run/model.safetensors --coco $(DEMO)/toy --out $(DEMO)/pictures --cpu
	@echo 'curves and more pictures: $(DEMO)/run; the same command goes on where it was stopped'

test: $(STAMP)
	$(MAKE) --no-print-directory sync
	$(MAKE) --no-print-directory notebooks
	$(MAKE) --no-print-directory docs-check
	$(MAKE) --no-print-directory pytest

sync: $(STAMP)
	python tools/notebooks.py sync
	python tools/docs.py readme --check

notebooks: $(STAMP)
	python tools/notebooks.py check --jobs $(JOBS) $(NOTEBOOKS)

pytest: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest tests --numprocesses $(JOBS) --dist loadfile

slow: $(STAMP)
	python -m pytest tests -m slow

long: $(STAMP)
	python -m pytest tests -m long --numprocesses $(JOBS)

bench: $(STAMP)
	python benchmarks/run.py

fuzz: $(STAMP)
	SCRATCHDET_FUZZ=$(INPUTS) python -m pytest tests/test_fuzz.py

docs: $(STAMP)
	python tools/docs.py build

docs-check: $(STAMP)
	python tools/docs.py check

export: $(STAMP)
	nbdev_export
	nbdev_clean

readme: $(STAMP)
	python tools/notebooks.py run nbs/index.ipynb
	nbdev_clean --fname nbs/index.ipynb
	python tools/docs.py readme

clean:
	rm -rf _docs _proc build dist .pytest_cache .hypothesis
