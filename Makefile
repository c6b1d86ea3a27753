# Everything here needs Python >= 3.11, make and a C compiler; each target makes .venv and installs what it uses.
PYTHON ?= python3
FAMILY ?= cogvideox
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml

.PHONY: demo test torture lint bench reproduce base base-cogvideox base-wan clean

demo: $(VENV)/.installed  ## [FAMILY=cogvideox|wan] convert the shipped base, train the adapter's last stretch, sample held-out subjects, score them
	$(BIN)/sdv demo --family $(FAMILY)

test: $(VENV)/.tested  ## every test, on the CPU, by two processes
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

torture: $(VENV)/.tested  ## kill a small-world run 30 times on one process and on two; it must end bit-equal to an unbroken one
	$(BIN)/python -m tests.train.torture --processes 1
	$(BIN)/python -m tests.train.torture --processes 2

lint: $(VENV)/.tested
	$(BIN)/python -m pip install -q ruff
	$(BIN)/python -m ruff check sdv_jax tests configs launch convert benchmarks

bench: $(VENV)/.tested  ## our sampling loop against diffusers, on the CPU
	$(BIN)/python benchmarks/cpu_sample.py

reproduce: $(VENV)/.installed  ## the paper's ablations in the small world, both families, then docs/reproduction.md: a night or two; resumes
	$(BIN)/python -m sdv_jax.small_world.reproduction
	$(BIN)/python -m sdv_jax.small_world.reproduction_report

base: $(VENV)/.installed base-$(FAMILY)  ## [FAMILY=cogvideox|wan] train the shipped base again, from nothing: over an hour, or two and a half

base-cogvideox: $(VENV)/.installed
	$(BIN)/python -m sdv_jax.small_world.base --config configs/small_world_base.py --workdir runs/base --out runs/small-world-cogvideox

base-wan: $(VENV)/.installed
	test -d runs/wan_base/first || $(BIN)/python -m sdv_jax.small_world.base --config configs/small_world_wan_base.py --workdir runs/wan_base --out runs/wan_base/first
	$(BIN)/python -m sdv_jax.small_world.base --config configs/small_world_wan_base_frames.py --workdir runs/wan_base --out runs/small-world-wan

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sdv_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.tested: $(VENV)/.made $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs
