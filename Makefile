# Every target makes its own environment in .venv first. Minutes are for 2 CPU cores.
PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
RUN = .venv/bin/python

.PHONY: help setup image_jepa video_jepa world_model ablations results test clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*##' '/^[a-z_]+:.*##/ {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet $(PIP_ARGS) -r requirements.txt -c constraints.txt
	touch $@

setup: .venv/ready  ## the environment (1-3 minutes, 5 GB)

image_jepa: .venv/ready  ## features of unlabelled images, probed; ARGS="--loss sigreg", "--data path/to/folder" and any other flag
	$(RUN) image_jepa.py $(ARGS)

video_jepa: .venv/ready  ## predict latents of coming frames of moving digits; ARGS="--data glyphs" needs no files
	$(RUN) video_jepa.py $(ARGS)

world_model: .venv/ready  ## train a world model and plan with it; ARGS="--preset paper" and any other flag
	$(RUN) world_model.py $(ARGS)

ABLATIONS = none variance covariance similarity inverse-dynamics rollout
ablations: .venv/ready  ## the world model without each of its loss terms
	for term in $(ABLATIONS); do \
	  folder=runs/world_model/ablate-$$term; flag="--ablate $$term"; \
	  if [ $$term = none ]; then flag=""; fi; \
	  if [ -f $$folder/summary.json ]; then continue; fi; \
	  if [ -d $$folder ]; then flag="$$flag --resume"; fi; \
	  $(RUN) world_model.py --steps 1200 $$flag --run-dir $$folder $(ARGS) || exit 1; \
	done
	$(RUN) results/tables.py runs/world_model/ablate-*

results: .venv/ready  ## write the README's tables anew from results/
	$(RUN) results/tables.py --readme

test: .venv/ready  ## all tests
	$(RUN) -m pytest -q tests $(ARGS)

clean:  ## remove the environment (runs and data stay)
	rm -rf .venv
