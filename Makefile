# Two commands: `make train` trains the demo from nothing, `make test` runs every check.
#
#   PYTHON=python3.12 make train     another interpreter (3.11 or 3.12)
#   TORCH_INDEX=URL make train       an index that has the torch build for this machine; unset: pip's own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: train test lint slurm bench faults matrices gpu ladder kernels oldest clean

train: $(VENV)/installed
	$(BIN)/nlscale data prepare stdlib --out corpora/stdlib --sequence 256 --tokeniser bpe:4096 --held-out 0.05
	$(BIN)/nlscale train demo

test: lint slurm
	tests/all.sh $(BIN)/python

# Packages of a real Slurm, which its tests bring up for themselves. Where they cannot be installed, those tests say so.
SLURM := slurmctld slurmd slurm-client munge iproute2 slurmdbd mariadb-server-core mariadb-client-core
slurm:
	@dpkg -s $(SLURM) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; } || \
		echo "no Slurm here, and no right to install one: its tests are skipped"

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/nlscale bench step
	$(BIN)/nlscale bench data
	$(BIN)/nlscale bench levels
	$(BIN)/nlscale bench memories

# Faults injected for real, the long way: every boundary of a save, fifty kills at random moments, a hundred flipped bits.
faults: $(VENV)/tested
	$(BIN)/python -m pytest -m slow -s

# The cases of every matrix of layouts, policies and rules that `make test` leaves out.
matrices: $(VENV)/tested
	$(BIN)/python -m pytest -m matrix

# Every GPU test, then every table that needs a GPU, into the folder OUT, in one go; what fails is said, and the rest goes on.
#
#   make gpu                in .venv
#   make gpu BARE=python3   nothing is installed: that Python has torch and Triton, megatron-core, omegaconf, pytest and xxhash too
OUT ?= gpu
gpu: $(if $(BARE),,$(VENV)/tested)
	tests/gpu/all.sh "$(or $(BARE),$(BIN)/python)" "$(OUT)"

# Speed, MFU and memory of the ladder's small sizes on one GPU, compiled and not: 24 runs, a quarter of an hour or so. The figures
# are written to OUT/ladder.json after each, and the table of README is printed at the end.
ladder: $(VENV)/tested
	mkdir -p $(OUT)
	$(BIN)/nlscale bench ladder --json $(OUT)/ladder.json

# Machine code for more GPUs and by more versions of Triton than `make test` compiles.
TRITONS := 3.6.0 3.8.0 3.9.0
kernels: $(VENV)/tested
	$(BIN)/python -m nlscale_kernels.aot --arch 80 90 100
	$(BIN)/python -m nlscale_kernels.aot --launched
	for version in $(TRITONS); do \
		$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton-$$version triton==$$version && \
		PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m nlscale_kernels.aot --arch 80 90 100 || exit 1; \
	done

# Tests of kernels and models by the oldest torch and Triton that setup.py takes, in a venv of their own: what is compiled there
# may be another thing. pip's own torch comes with gigabytes; TORCH_INDEX may name one without.
OLDEST := $(VENV)/oldest
oldest:
	$(PYTHON) -m venv $(OLDEST)
	{ grep -v -e ^torch -e ^triton constraints.txt; echo torch==2.11.0; echo triton==3.6.0; } >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	$(OLDEST)/bin/python -m pytest tests/kernels tests/model -n logical --maxprocesses 8 --dist loadfile

# torch comes first and alone: asked for by another package, the newest CUDA build would come with gigabytes.
$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "nlscale needs Python 3.11 or 3.12; PYTHON=python3.12 make ... chooses one"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python's venv is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs corpora
