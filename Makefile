# Every target makes its own environment in .venv first. Minutes and figures are for 2 CPU cores; on a GPU nothing is measured yet.
PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
RUN = .venv/bin/python

.PHONY: help setup demo image_jepa video_jepa world_model ablations gpu_check gpu_campaign bench results test torture clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*##' '/^[a-z_]+:.*##/ {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  minutes and figures: 2 CPU cores; on a GPU not measured yet"

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet $(PIP_ARGS) -r requirements.txt -c constraints.txt
	touch $@

.venv/tests: .venv/ready tests/requirements.txt
	$(RUN) -m pip install --quiet $(PIP_ARGS) -r tests/requirements.txt -c constraints.txt
	touch $@

setup: .venv/ready  ## the environment (1-3 minutes, 5 GB)

demo: .venv/ready  ## trained models at once: plans, predictions, neighbours of images (a minute); ARGS="--images FOLDER" for yours
	$(RUN) results/demo.py $(ARGS)

image_jepa: .venv/ready  ## features of unlabelled images (13 minutes, 73 %); ARGS="--data path/to/folder" for your own, "--loss sigreg" and any other flag
	$(RUN) image_jepa.py $(ARGS)
	$(RUN) results/draw.py --newest image_jepa

video_jepa: .venv/ready  ## predict latents of coming frames of moving digits (10 minutes, mAP .60); ARGS="--data digits" needs no files
	$(RUN) video_jepa.py $(ARGS)
	$(RUN) results/draw.py --newest video_jepa

world_model: .venv/ready  ## train a world model and plan with it (10 minutes, 99 %); ARGS="--preset paper" and any other flag
	$(RUN) world_model.py $(ARGS)
	$(RUN) results/draw.py --newest world_model

ablations: .venv/ready  ## every script with one part changed at a time (about 100 minutes); ARGS=video_jepa for one
	$(RUN) results/campaign.py ablations $(ARGS)

gpu_check: .venv/tests  ## on a GPU: tests, benchmark, 30 timed steps of presets gpu and paper; one table (some minutes)
	$(RUN) results/gpu_check.py $(ARGS)

gpu_campaign: .venv/ready  ## on a GPU: benchmark, presets gpu and paper, into results/, 9 minutes a call
	$(RUN) results/campaign.py gpu $(ARGS)

bench: .venv/ready  ## time the kernels: as usually written / torch.compile / ours (about a minute); ARGS="--json FILE" also writes a file
	$(RUN) -m kernels.bench $(ARGS)

results: .venv/ready  ## write the README's tables and its first picture anew from results/
	$(RUN) results/overview.py
	$(RUN) results/tables.py --readme

test: .venv/tests  ## all tests (7 minutes, two at a time; ARGS="-k name" for some)
	$(RUN) -m pytest -q -n 2 --dist worksteal tests $(ARGS)

torture: .venv/ready  ## kill every script 20 times and compare with a run left alone (about 20 minutes; ARGS=6 for 6 times)
	$(RUN) tests/torture.py $(ARGS)

clean:  ## remove the environment (runs and data stay)
	rm -rf .venv
