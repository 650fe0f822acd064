# NAT / NAT++ reproduced. `make` alone prints what there is; README.md says more.
# Needs Python 3.11 or newer, make and git. Everything else goes into .venv.

SCALE   ?= reduced
DATASET ?= auto
# A smoke notebook's records take seconds, as starting a worker process does.
WORKERS ?= $(if $(filter smoke,$(SCALE)),1)
NOTEBOOKS ?= 2
FRESH   ?= 0
DRY_RUN ?= 0
PYTHON  ?= python3

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY     := .venv/bin/python
SETUP  := .venv/installed
SCALES := smoke reduced extended paper
# One for each folder and command: two makes in one folder must not run each other's notebooks.
PLAN    = .make/graph.$(NATLIB_MAKE)
GRAPH   = $(PY) scripts/graph.py --scale $(SCALE) $(if $(WORKERS),--workers $(WORKERS)) --output $(PLAN)
EXECUTE = trap 'rm -f $(PLAN).*' EXIT; $(PY) scripts/warm.py $$(< $(PLAN).imports) -- \
          $(MAKE) --no-print-directory -j $(NOTEBOOKS) -f $(PLAN).mk

# The runner ends when this make was killed.
export NATLIB_MAKE := $(shell echo $$PPID)

# By the shell: make would cut names at spaces.
REPORT = runs/transform/$$(file="$(GENOTYPE)"; file="$${file\#\#*/}"; echo "$${file%.*}")

ifeq ($(filter $(SCALES),$(SCALE)),)
$(error SCALE=$(SCALE) is not one of: $(SCALES))
endif
ifneq ($(filter-out 0 1,$(FRESH)),)
$(error FRESH=$(FRESH) must be 0 or 1)
endif
ifneq ($(filter-out 0 1,$(DRY_RUN)),)
$(error DRY_RUN=$(DRY_RUN) must be 0 or 1)
endif
DONE = :
ifeq ($(FRESH)$(DRY_RUN),10)
ifneq ($(filter reproduce notebook transform,$(MAKECMDGOALS)),)
# One moment for all notebooks, so that they share the records made after it; kept until the command
# is done, so that after an interruption it goes on.
BEGUN := .make/fresh.$(SCALE)
$(if $(wildcard $(BEGUN)),$(info going on with FRESH=1 of $(shell date -r $(BEGUN)); to begin anew: rm $(BEGUN)))
export NATLIB_FRESH := $(shell mkdir -p .make; test -s $(BEGUN) || date +%s > $(BEGUN); cat $(BEGUN))
GRAPH += --fresh
DONE = rm -f $(BEGUN)
endif
endif

.PHONY: help setup reproduce test lint book verify reference restore transform bench notebook lab stale \
        clean distclean

help: ## print this list
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1@\2/p' $(MAKEFILE_LIST) | \
	  while IFS=@ read -r target text; do printf '  %-11s %s\n' $$target "$$text"; done
	@echo
	@echo "  SCALE=reduced   smoke (minutes), reduced, extended (hours), paper (published settings, GPU)"
	@echo "  DATASET=auto    cifar10, cifar100, fashion_mnist; auto: cifar10 where it can be had"
	@echo "  WORKERS=n       worker processes in a notebook (default: one a core)"
	@echo "  NOTEBOOKS=2     notebooks that run side by side"
	@echo "  FRESH=1         compute again what is recorded"
	@echo "  DRY_RUN=1       with reproduce: only say what SCALE will cost (GPU-hours, memory, disk)"
	@echo "  PYTHON=python3  the Python that .venv is made with"
	@echo "  environment: NATLIB_DATA (folder with data sets), NATLIB_RUNS (folder of the records)"

# --- set-up -------------------------------------------------------------------------------------

setup: $(SETUP) ## make .venv (every target does this by itself)

$(SETUP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON): install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: %s is Python %d.%d; 3.11 or newer is needed: name another with PYTHON=python3.12, say" % (sys.executable, v[0], v[1]))'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "== setting up .venv with $$($(PYTHON) --version): some minutes, up to 6 GB (PyTorch is large) =="
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[book,dev]'
	@touch $@
	@echo "== set-up done =="

# --- running ------------------------------------------------------------------------------------

ifeq ($(DRY_RUN),1)
reproduce: $(SETUP) ## run all notebooks and build the book with its scorecard
	@$(PY) scripts/dry_run.py --scale $(SCALE)
else
reproduce: $(SETUP)
	@$(if $(filter paper,$(SCALE)),$(PY) scripts/dry_run.py --scale $(SCALE))
	@$(PY) scripts/dataset.py $(DATASET)
	@$(GRAPH)
	@$(EXECUTE) all
	@$(MAKE) --no-print-directory book
	@$(DONE)
endif

notebook: $(SETUP) ## run one notebook, NAME=..., and what it depends on
	@$(if $(NAME),,echo "error: give NAME=..., a notebook of experiments.yml" >&2; exit 1)
	@$(PY) scripts/dataset.py $(DATASET)
	@$(GRAPH) $(NAME)
	@$(EXECUTE) all
	@$(DONE)

transform: $(SETUP) ## your own architecture, GENOTYPE=cell.json, through the trained policy
	@$(if $(GENOTYPE),,echo "error: give GENOTYPE=..., a JSON file as README.md describes" >&2; exit 1)
	@test -f "$(GENOTYPE)" || { echo "error: GENOTYPE=$(GENOTYPE): there is no such file" >&2; exit 1; }
	@mkdir -p runs/transform && $(PY) -m natlib.export "$(GENOTYPE)" "$(REPORT).json" > /dev/null
	@$(PY) scripts/rewritable.py "$(GENOTYPE)" --scale $(SCALE)
	@$(PY) scripts/dataset.py $(DATASET)
	@$(GRAPH) 05_transform
	@$(EXECUTE) upstream
	@$(PY) scripts/run_notebook.py 05_transform --scale $(SCALE) \
	  $(if $(WORKERS),--workers $(WORKERS)) --set genotype="$(GENOTYPE)" --output "$(REPORT).ipynb"
	@$(PY) scripts/page.py "$(REPORT).ipynb"
	@$(DONE)

book: $(SETUP) ## build the book from the executed notebooks; trains nothing
	@$(PY) scripts/refresh.py
	@$(MAKE) --no-print-directory book/_build/html/index.html
	@echo "the book: $(CURDIR)/book/_build/html/index.html"

book/_build/html/index.html: .make/book.hash
	@echo "building the book ..."
	@$(PY) scripts/build_book.py

.make/book.hash: ;

lab: $(SETUP) ## edit the notebooks in JupyterLab
	@$(PY) -m jupyterlab notebooks

# --- checking -----------------------------------------------------------------------------------

test: $(SETUP) ## run all tests, a process a core
	@$(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(SETUP) ## ruff, mypy, notebooks without outputs
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m nbstripout --verify --keep-id notebooks/*.ipynb

verify: $(SETUP) ## compare this machine's results of SCALE with the recorded ones
	@$(PY) scripts/verify.py check --scale $(SCALE)

reference: $(SETUP) ## record this machine's results of SCALE as the reference
	@$(PY) scripts/verify.py record --scale $(SCALE)

restore: $(SETUP) ## go on from the recorded results of SCALE instead of computing them again
	@$(PY) scripts/verify.py restore --scale $(SCALE)

bench: $(SETUP) ## measure speed: a table, and JSON in runs/bench.json
	@$(PY) scripts/bench.py

stale: $(SETUP) ## list records that older source code made
	@$(PY) scripts/stale.py

# --- removing -----------------------------------------------------------------------------------

clean: ## remove executed notebooks and the book; keep records, data and .venv
	rm -rf .make book/executed book/_build runs/failed runs/verify

distclean: clean ## remove everything that was made, records and .venv too; keep data
	rm -rf .venv runs natlib.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
