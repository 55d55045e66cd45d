# make repro          run the pipeline              make test     run all tests
# make ui             browse the tracked runs       make lint     ruff, mypy, import contracts
# make bench          measure time and memory       make format   format the code
# make test-portable  numerical tests as on other   make clean    remove caches
#                     processors                    make soak     tests that take hours
# make full-size      a round with Stable Diffusion v1.5's shapes on the CPU: takes minutes
PYTHON ?= python3
TEST_PROCESSES ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DVC_NO_ANALYTICS := true
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: repro test test-portable full-size bench soak lint ui format clean

repro: $(STAMP)
	@$(BIN)/python -m spo repro

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

test-portable: $(STAMP)  # only numerical tests; the others do not depend on the processor
	TEST_PROCESSES=$(TEST_PROCESSES) $(BIN)/python tests/portable.py

full-size: $(STAMP)  # random weights; minutes, and 8.5 GB of the temporary folder
	SPO_FULL_SIZE=1 $(BIN)/python -m pytest tests/full_size -s

bench: $(STAMP)  # on the CPU; docs/performance.md has the commands for a GPU
	$(BIN)/python -m bench.profile_step --size tiny
	$(BIN)/python -m bench.profile_step --size small --micro-batch-size 5
	$(BIN)/python -m bench.spo_step --size small --micro-batch-size 2
	$(BIN)/python -m bench.preference_kinds --size tiny
	$(BIN)/python -m bench.preference_kinds --size small

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

SOAK_MINUTES ?= 60
soak: $(STAMP)  # takes hours: a hundred kills per stage, twenty times the hostile input, an hour of alignment
	SPO_SOAK=1 SPO_KILLS=100 SPO_EXAMPLES=20 $(BIN)/python -m pytest tests/stages/test_resume.py \
		tests/stages/test_prepare.py tests/models/test_denoiser.py tests/hostile tests/soak
	PYTHONPATH=. $(BIN)/python tests/soak/memory.py $(SOAK_MINUTES)

ui: $(STAMP)
	@$(BIN)/python -m spo mlflow-ui

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  # removes caches; keeps runs/, mlflow/ and the environment
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find spo flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: $(VENV)
$(VENV): $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python %d.%d is too old; spo needs 3.11 or later: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
