# `make demo` and `make test` set everything up by themselves: python3 and make are all they need.
# `make test-integrations` does so for each trainer, `make test-triton` for each supported Triton.
# On Linux without a GPU, torch's CPU build is the small one:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
TRAINERS ?= trl verl
# What the tests of each need beside the trainer: the demo's task runs in TRL, with and without adapters;
# verl's trainer imports packages that its metadata does not ask for.
WITH_trl := test,demo,trl
WITH_verl := test,verl
ALSO_trl := peft
ALSO_verl := cachetools fastapi uvicorn
# Versions of TRL that pass the tests of its options, losses and training, each on its own.
TRLS ?= 1.15.0 1.16.0
TRL_TESTS := $(patsubst %,tests/integrations/test_trl_%.py,construction parity training)
# One process a core; the tests of a file stay together, and so share what is expensive to make.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# Tritons that the kernels are interpreted and compiled with, beside the one in constraints.txt.
TRITONS ?= 3.6.0 3.8.0 3.9.0
# The interpreter of Triton 3.6 converts arrays of one element to numbers, which NumPy 2.4 refuses.
WITH_TRITON_3.6.0 := "numpy<2.4"

.PHONY: demo demo-trl test test-full test-integrations $(TRAINERS:%=test-with-%) test-trl-matrix test-triton lint docs bench \
	dist test-dist hub clean

demo: $(VENV)/.installed
	$(BIN)/mapo-kernels demo $(DEMO_ARGS)

# The demo's task, trained by TRL.
demo-trl: .venv-trl/.installed
	.venv-trl/bin/python examples/trl_demo.py $(DEMO_ARGS)

test: $(VENV)/.installed
	$(PYTEST) $(TEST_ARGS)

# What `make test` leaves out: combinations beyond pairs, slow cases (see tests/parts.py), and random
# cases for ten minutes, of which it has the first few. With fresh seeds, by hand:
#   MAPO_KERNELS_PROPERTY_MINUTES=30 make test-full
test-full: $(VENV)/.installed
	$(PYTEST) --part rest $(TEST_ARGS)
	HYPOTHESIS_PROFILE=long $(PYTEST) --part all tests/property $(TEST_ARGS)

# Each trainer in an environment of its own: their requirements of transformers contradict each other.
test-integrations: $(TRAINERS:%=test-with-%)

$(TRAINERS:%=test-with-%): test-with-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest --must-run tests/integrations/test_$**.py \
		tests/examples/test_$**.py $(TEST_ARGS)

test-trl-matrix: $(TRLS:%=test-with-trl-%)

$(TRLS:%=test-with-trl-%): test-with-trl-%: .venv-trl-%/.installed
	.venv-trl-$*/bin/python -m pytest --must-run $(TRL_TESTS) $(TEST_ARGS)

# A Triton lies in a folder of its own, which comes before the environment's on the path.
test-triton: $(TRITONS:%=test-triton-%)

$(TRITONS:%=test-triton-%): test-triton-%: .triton/%/.installed
	MAPO_KERNELS_TEST_TRITON=$* PYTHONPATH=$(CURDIR)/.triton/$* \
		$(PYTEST) -k "interpreter or codegen or triton_version" $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The site, for `python3 -m http.server --directory build/site`. Material tells of its successor, once
# a build, unless the variable is set.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	MAPO_KERNELS_SITE=build/site $(BIN)/python -m pytest -q tests/package/test_site.py

bench: $(VENV)/.installed
	$(BIN)/mapo-kernels bench $(BENCH_ARGS)

# The source distribution, and the wheel that is built from it.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# In an empty environment, outside the checkout.
test-dist: dist
	PYTHON=$(abspath $(BIN))/python PIP_ARGS="$(PIP_ARGS)" tests/package/installed.sh

# A kernel for the Hugging Face Hub, in build/hub.
hub: $(VENV)/.installed
	$(BIN)/python hub/build.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[docs]"
	touch $@

$(TRAINERS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install $(PIP_ARGS) -c constraints-$*.txt -e ".[$(WITH_$*)]" $(ALSO_$*)
	touch $@

# As constraints-trl.txt has it, but for TRL.
$(TRLS:%=.venv-trl-%/.installed): .venv-trl-%/.installed: pyproject.toml constraints-trl.txt
	$(PYTHON) -m venv .venv-trl-$*
	sed 's/^trl==.*/trl==$*/' constraints-trl.txt > .venv-trl-$*/constraints.txt
	.venv-trl-$*/bin/python -m pip install $(PIP_ARGS) -c .venv-trl-$*/constraints.txt -e ".[$(WITH_trl)]" $(ALSO_trl)
	touch $@

.triton/%/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --upgrade --target $(@D) triton==$* $(WITH_TRITON_$*)
	touch $@

clean:
	rm -rf $(VENV) .venv-* .triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
