# `make demo` and `make test` set everything up by themselves: python3 and make are all they need.
# `make test-integrations` does so for each trainer.
# On Linux without a GPU, torch's CPU build is the small one:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
TRAINERS ?= trl verl
# What verl's trainer imports and its metadata does not ask for.
ALSO_verl := cachetools fastapi uvicorn

.PHONY: demo test test-integrations $(TRAINERS:%=test-with-%) lint bench clean

demo: $(VENV)/.installed
	$(BIN)/mapo-kernels demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto $(TEST_ARGS)

# Each trainer in an environment of its own: their requirements of transformers contradict each other.
test-integrations: $(TRAINERS:%=test-with-%)

$(TRAINERS:%=test-with-%): test-with-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest --must-run tests/integrations/test_$**.py $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-sort=name

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

$(TRAINERS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install $(PIP_ARGS) -c constraints-$*.txt -e ".[test,$*]" $(ALSO_$*)
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
