# Everything runs in .venv, made on first use with the versions of constraints.txt.
# Another Python (3.10 to 3.13): make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# The Triton that our kernels were tuned with, beside the one that torch asks for. Tests compile with it; nothing is run.
TUNED_WITH := $(shell sed -n 's/^TUNED_WITH = "\(.*\)".*/\1/p' kernels/triton_backend.py)
TUNED := $(VENV)/triton-$(TUNED_WITH)

# Tests compute on one thread each. A file stays in one process, for what its tests share.
WORKERS := 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu aot lint bench targets clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

$(TUNED): | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
		"triton==$(TUNED_WITH); sys_platform == 'linux'"
	mkdir -p $@

demo: $(READY)  ## a video with and without enable_fast_attention, into outputs/
	$(RUN) examples/text_to_video.py

test: $(READY) $(TUNED)  ## every test that needs no GPU
	$(RUN) -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile

test-gpu: $(READY)  ## the tests that need an NVIDIA GPU
	$(RUN) -m pytest -m gpu

aot: $(READY) $(TUNED)  ## compile every form of our kernels for every card, some hours; ONLY="flash sm_90" for a part
	$(RUN) tests/aot.py --only "$(ONLY)"

lint: $(READY)  ## ruff's rules and ruff's format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(READY)  ## measure on this machine's GPU; appends to benchmarks/results/
	$(RUN) -m videoattn.benchmarks.all

targets: $(READY)  ## every bar of benchmarks/targets.toml against the results in git
	$(RUN) -m videoattn.benchmarks.targets

clean:  ## remove .venv and what tests and demos wrote
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .ruff_cache
