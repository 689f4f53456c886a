# Everything runs in .venv, which the first command makes. Needs git, make and Python 3.11 or newer.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help merge promote rollback sweep serve worker status ui docs test check format lock

RECIPE ?= modality
DEVICE ?=
PROCESSES ?=
ALERT ?= $(ALLOY_ALERT)
POOL ?=
SLOW   ?=
ARGS   ?=
UV_VERSION := 0.13.9

BIN := .venv/bin
READY := .venv/.ready
export ALLOY_DEVICE := $(DEVICE)
export ALLOY_PROCESSES := $(PROCESSES)
export ALLOY_ALERT := $(ALERT)
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list the commands
	@echo 'make COMMAND [RECIPE=modality] [DEVICE=cpu|cuda|cuda:1|mps] [PROCESSES=2]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

merge: $(READY) ## run what is stale of RECIPE, from checkpoints to a registered model
	@python -m flows.pipeline '$(RECIPE)' $(ARGS)

promote: $(READY) ## make the newest version of RECIPE the champion if its gates are met
	@python -m flows.promote '$(RECIPE)' $(ARGS)

rollback: $(READY) ## give the champion's place back to the version that had it before
	@python -m flows.promote '$(RECIPE)' --rollback $(ARGS)

sweep: $(READY) ## RECIPE with many settings: ARGS='merge.result=interpolation,regmean'
	@python -m flows.sweep '$(RECIPE)' $(ARGS)

serve: $(READY) ## a local Prefect server on which RECIPE runs every night and promotion follows
	@python -m flows.serve '$(RECIPE)' $(ARGS)

worker: $(READY) ## run the stages that params/placement.yaml places in POOL, with this clone
	@python -m flows.placement.worker '$(POOL)' $(ARGS)

status: $(READY) ## the last runs of each flow, and who is champion of RECIPE
	@python -m flows.status '$(RECIPE)' $(ARGS)

ui: $(READY) ## a page of all recipes and results, with those of Prefect and MLflow
	@python -m flows.ui $(ARGS)

docs: $(READY) ## build the site into site/; a broken link or an unexplained name stops it
	@NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
	@echo 'The site: site/index.html'

test: $(READY) ## the default tests; SLOW=1 adds the longer proofs, ARGS='-k name' chooses
	@OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal $(if $(SLOW),,-m 'not slow') $(ARGS)

check: $(READY) ## what CI checks besides the tests: lint, format, types, layers
	ruff check
	ruff format --check
	ty check
	lint-imports

format: $(READY) ## fix what ruff can fix
	ruff check --fix
	ruff format

lock: $(READY) ## resolve requirements.lock anew from pyproject.toml
	uv pip compile --quiet --upgrade --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
	  --python-version 3.11 --override requirements.overrides --all-extras pyproject.toml \
	  | sed 's/+cpu$$//' > requirements.lock.new
	mv requirements.lock.new requirements.lock

# The interpreter may be called anything; the first that is new enough is taken.
# pip's settings for this machine (wheels at hand, an index of its own) are passed on to uv, which does not read them.
$(READY): requirements.lock requirements.overrides pyproject.toml
	@.ci/venv .venv $(UV_VERSION)
	@.ci/repository
	@touch $@
