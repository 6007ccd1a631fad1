# make demo       train the CURVES autoencoder with K-BFGS and with Adam, compare them in a figure
# make test       the whole test suite
# make coverage   the same, and which lines of the package it does not run
# make mutants    whether the tests find mistakes made on purpose
# make bench      what a step costs beside a plain one, by method, stage, width and batch
# make reproduce-quick  the paper's comparison in small: under 30 minutes on 2 cores
# make reproduce  the same at full size, tuned, 3 seeds: some 45 hours on 2 cores, can be broken off
# make docs       the documentation's site, in site/; warnings are errors
#
# The two of the comparison need the raw files of MNIST and FACES: DATA=FOLDER names their folder.
#
# Each target makes its own virtual environment first: .venv, or .venv-NAME with PYTHON=NAME, as in
#     make test PYTHON=python3.12

PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO := runs/demo
PRICE := $(BIN)/python -m benchmarks.price
# Settings of the K-BFGS run that differ from configs/curves.py.
KBFGS_SETTINGS ?=
KBFGS_EPOCHS ?= 30
ADAM_EPOCHS ?= 60

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-fast test-slow coverage mutants soak bench bench-more reproduce \
	reproduce-quick lint docs wheel-check clean

help:
	@sed -n '1,/^$$/ s/^# \{0,1\}//p' Makefile
	@echo "also: test-fast (the library without the experiments), test-slow, soak, bench-more,"
	@echo "notebooks (runs them anew), lint, wheel-check (tries the package in an empty environment), clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) does not run, or is older than Python 3.11; name another: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV); the first time this fetches packages and takes a few minutes"
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; a change of pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(subst +,$(comma),$*)]'
	@touch $@

comma := ,

demo: $(VENV)/.installed-experiment
	@if [ -e $(DEMO) ]; then \
		kept=$(DEMO)-before-$$(date +%Y%m%d-%H%M%S); \
		mv $(DEMO) $$kept && echo "the demo before this one is kept in $$kept"; fi
	$(BIN)/kfqn-train --config configs/curves.py --workdir $(DEMO)/kbfgs \
		--config.epochs=$(KBFGS_EPOCHS) $(KBFGS_SETTINGS)
	$(BIN)/kfqn-train --config configs/curves.py --workdir $(DEMO)/adam \
		--config.optimizer=adam --config.learning_rate=0.001 --config.epochs=$(ADAM_EPOCHS)
	$(BIN)/kfqn-compare $(DEMO)/kbfgs $(DEMO)/adam --output $(DEMO)/compare.png

# Runs the notebooks at full size and writes them back with their outputs.
notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python notebooks/execute.py

test: $(VENV)/.installed-experiment+test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/experiment --ignore=kfqn_optax/experiment

test-slow: $(VENV)/.installed-experiment+test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

coverage: $(VENV)/.installed-experiment+test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing

# Mistakes that were tried before are not tried again; AGAIN=--again tries them all.
AGAIN ?=
mutants: $(VENV)/.installed-experiment+test
	$(BIN)/python -m benchmarks.mutants $(AGAIN)

# Property tests with 20 times the cases.
soak: $(VENV)/.installed-experiment+test
	$(BIN)/python -m pytest -n $(WORKERS) -m soak tests

# Each part is a process of its own and adds to the same file.
bench: $(VENV)/.installed-experiment
	$(PRICE) --sizes mnist curves faces --peers
	$(PRICE) --sizes mnist --candidates --stages kbfgs kfqn
	$(PRICE) --sizes width-256 width-512 width-1024 width-2048 --candidates kbfgs kfqn
	$(PRICE) --sizes batch-100 batch-1000 batch-10000 --candidates kbfgs
	$(PRICE).draw

bench-more: $(VENV)/.installed-experiment
	$(PRICE) --sizes mnist --candidates all --peers
	$(PRICE) --sizes cnn transformer transformer-all

# The folder with the raw files of MNIST and FACES, where they are not in TFDS's manual folder.
DATA ?=
REPRODUCE := $(BIN)/python -m benchmarks.reproduce

# Both go on where they were broken off; what has ended is not run again.
reproduce: $(VENV)/.installed-experiment
	$(REPRODUCE) full $(if $(DATA),--data_dir $(DATA))

reproduce-quick: $(VENV)/.installed-experiment
	$(REPRODUCE) quick $(if $(DATA),--data_dir $(DATA)) --readme README.md

lint: $(VENV)/.installed-experiment+test+lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: site/index.html"

wheel-check: $(VENV)/.installed-release
	$(BIN)/python tools/wheel_check.py

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .ruff_cache
