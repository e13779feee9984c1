# Two commands for a fresh machine (Python 3.11, g++, make): `make train`, `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNS ?= runs
export OMP_NUM_THREADS := 1

.PHONY: setup train test lint clean reshard-cases

setup: $(READY)

# Fully pinned, so pip resolves nothing; the editable install adds the console script `hybridflow`.
$(READY): requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

# The main job: a supervised warm start from a random model, then GRPO on two-digit addition. SFT_ARGS and GRPO_ARGS take
# further overrides.
train: $(READY)
	$(BIN)/hybridflow train experiment=arithmetic_sft run_folder=$(RUNS)/arithmetic-sft overwrite=true $(SFT_ARGS)
	$(BIN)/hybridflow train experiment=arithmetic_grpo model.path=$(RUNS)/arithmetic-sft/model \
		run_folder=$(RUNS)/arithmetic-grpo overwrite=true $(GRPO_ARGS)

# Six short runs: all pairs of training layout, generation layout, replicas, and colocated or split. CASES takes some.
reshard-cases: $(READY)
	$(BIN)/python benchmarks/reshard_cases.py $(CASES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY) lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) $(RUNS)
