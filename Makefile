# make demo   trains a network on real digits, prunes and quantizes it, and shows what that cost and what it brought
# make test   everything that must hold before a change lands;  make test-all: the same, larger and longer
# make docs   writes the pages that are made from the code;     make bench: the figures of the README
# make mutants   breaks the code in 64 places, one at a time, and sees that its tests notice
#
# Each sets up .venv itself. PYTHON=python3.12 make venv chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# One thread an operation: two test processes then share two cores fairly, and sums come in one order.
test test-all mutants bench: export OMP_NUM_THREADS = 1

.PHONY: venv demo test test-all mutants lint browser docs bench clean

venv: $(VENV)/test.stamp

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsify needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples.stamp: pyproject.toml constraints.txt | $(RUN)
	@echo "Installing sparsify and what the demo needs into $(VENV): a few minutes the first time."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[examples]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(RUN)
	@echo "Installing sparsify and what its tests need into $(VENV): a few minutes the first time."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/examples.stamp

demo: $(VENV)/examples.stamp
	$(RUN) examples/digits_resnet.py

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(RUN) -m pytest -n 2 --dist worksteal -q

# The Optimize screen is tried in a real browser where there is one, or one can be had; those tests are skipped elsewhere.
browser:
	-@command -v chromedriver > /dev/null || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)

test-all: lint browser
	SPARSIFY_TESTS=all $(RUN) -m pytest -n 2 --dist worksteal -q -m ''

mutants: $(VENV)/test.stamp
	$(RUN) tests/mutants.py

docs: $(VENV)/test.stamp
	$(RUN) docs/generate.py

bench: $(VENV)/examples.stamp
	$(RUN) benchmarks/import_time.py
	$(RUN) benchmarks/mask_update.py
	$(RUN) benchmarks/step_overhead.py
	$(RUN) benchmarks/digits_recovery.py

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
