# `make` without a target lists them.
.DEFAULT_GOAL := help

.PHONY: help demo test test-ddpo test-deepspeed test-gpu compare compare-quick reliability coverage mutation docs upstream quality house style clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
DDPO_BIN := .venv-ddpo/bin
DDPO_STAMP := .venv-ddpo/.installed
DEEPSPEED_BIN := .venv-deepspeed/bin
DEEPSPEED_STAMP := .venv-deepspeed/.installed
MUTATION_BIN := .venv-mutation/bin
MUTATION_STAMP := .venv-mutation/.installed

# Which build of torch: on Linux a package index offers the one with CUDA first, some gigabytes that no target here needs.
# TORCH_INDEX names an index with another build, such as PyTorch's own for the CPU: make demo TORCH_INDEX=ADDRESS
TORCH_INDEX ?=
TORCH_OPTIONS = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c $(1))

help:  ## this list
	@echo "usage: make TARGET [PYTHON=python3.11] [TORCH_INDEX=address of a package index with the torch you want]"
	@echo
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# A fresh machine needs nothing but Python 3.11: every target installs the pinned set first.
$(STAMP): constraints.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch and the packages of constraints.txt into .venv; this takes some minutes."
	$(BIN)/python -m pip install --quiet $(call TORCH_OPTIONS,constraints.txt) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: export OMP_WAIT_POLICY := PASSIVE
test coverage: export OMP_WAIT_POLICY := PASSIVE
test coverage: export OMP_NUM_THREADS := 1
# The tests of `tests/gpu` run on the CPU here, so that they are known to be right when a GPU is at hand.
test coverage: export TRL_SPO_TEST_DEVICE := cpu
test-ddpo test-deepspeed: export OMP_WAIT_POLICY := PASSIVE
test-deepspeed: export OMP_NUM_THREADS := 1

demo: $(STAMP)  ## reward model, SPO and evaluation in the shapes world: about 5 minutes once installed; writes demo_output/
	$(BIN)/python examples/shapes/demo.py --output_dir demo_output

test: $(STAMP)  ## the whole test suite: about a quarter of an hour on two cores
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# A machine with a GPU has a torch of its own, and perhaps no network: nothing is installed.
test-gpu:  ## both trainers on the GPU of this machine: under four minutes; without one it says so
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pytest tests/gpu

$(DDPO_STAMP): constraints-ddpo.txt setup.cfg pyproject.toml
	test -x $(DDPO_BIN)/python || $(PYTHON) -m venv .venv-ddpo
	$(DDPO_BIN)/python -m pip install --quiet $(call TORCH_OPTIONS,constraints-ddpo.txt) "$$(grep '^torch==' constraints-ddpo.txt)"
	$(DDPO_BIN)/python -m pip install --quiet -c constraints-ddpo.txt -e ".[test,ddpo]"
	$(DDPO_BIN)/python -c "from trl import DDPOTrainer"
	touch $@

test-ddpo: $(DDPO_STAMP)  ## beside the last TRL that has DDPO: its trainer on our pipeline, ours on its
	$(DDPO_BIN)/python -m pytest tests/test_ddpo_trainer.py tests/test_ddpo_interop.py tests/test_pipelines.py

# DeepSpeed builds on the torch that it finds, so it has an environment of its own, which sees the packages of .venv.
$(DEEPSPEED_STAMP): $(STAMP)
	test -x $(DEEPSPEED_BIN)/python || $(BIN)/python -m venv .venv-deepspeed
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(DEEPSPEED_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	$(DEEPSPEED_BIN)/python -m pip install --quiet -c constraints.txt deepspeed
	touch $@

test-deepspeed: $(DEEPSPEED_STAMP)  ## ZeRO-2 and ZeRO-3 with DeepSpeed, in two processes: about four minutes
	$(DEEPSPEED_BIN)/python -m pytest tests/test_zero3.py tests/test_distributed.py -k "zero"

compare: $(STAMP) $(DDPO_STAMP)  ## every method, rival and ablation in the shapes world: a night on two cores, resumable
	$(BIN)/python benchmarks/rivals.py --model flow --output compare_output/rivals
	$(BIN)/python benchmarks/rivals.py --model unet --output compare_output/rivals
	$(BIN)/python benchmarks/compare/run.py --output compare_output

compare-quick: $(STAMP)  ## SPO, LPO and three rivals, one seed: at most a quarter of an hour, a table last
	$(BIN)/python benchmarks/rivals.py --quick --model flow --output compare_quick

reliability: $(STAMP)  ## kills, faults, two processes, bad input: up to half an hour, then a table
	$(BIN)/python reliability/run.py

coverage: $(STAMP)  ## lines and branches of trl_spo that the suite runs; less than 90% is an error
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered

# mutmut has an environment of its own, which sees the packages of .venv and does not change them.
$(MUTATION_STAMP): $(STAMP)
	test -x $(MUTATION_BIN)/python || $(BIN)/python -m venv .venv-mutation
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(MUTATION_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	$(MUTATION_BIN)/python -m pip install --quiet -c constraints.txt mutmut==3.8.1 libcst==1.9.0
	touch $@

mutation: $(MUTATION_STAMP)  ## changes to the pure modules that no test notices; some minutes
	$(MUTATION_BIN)/python reliability/mutation.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

docs: $(DOCS_STAMP)  ## the pages and the API reference, into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

upstream: $(STAMP)  ## copy the project into a checkout of TRL, see upstream/README.md
	@test -n "$(TRL)" || { echo "usage: make upstream TRL=path/to/trl" >&2; exit 2; }
	$(BIN)/python upstream/port_to_trl.py $(TRL)

quality: $(STAMP)  ## what CI asks of the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

house: $(STAMP)  ## numbers about how the code is written; REV=<commit> measures another version
	$(BIN)/python reliability/house.py $(if $(REV),--rev $(REV))

style: $(STAMP)  ## repairs of the style that need no thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes what was generated
	rm -rf demo_output demo_output_flow compare_quick reliability_output docs/_build docs/api build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path "./.venv*/*" -exec rm -rf {} +
