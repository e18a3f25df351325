# Two commands do everything on a machine with Python and pip:
#   make demo    installs into .venv and runs the main job on embedded defaults
#   make test    installs into .venv and runs the tests
# Others:
#   make lint         mends what ruff can mend; ruff, codespell, mypy
#   make coverage     the tests, with lines and branches counted
#   make stress       the tests of faults in full counts; writes docs/reliability.md
#   make test-lowest  the tests with the lowest supported versions
#   make test-newest  the tests with the newest versions there are
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

ALL = ".[offline,plots,test,timm]"

.PHONY: demo test lint coverage stress test-lowest test-newest bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e $(ALL)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m sklearn_transfer.demo

test: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/python -m codespell_lib sklearn_transfer tests benchmarks docs *.md
	$(BIN)/python -m mypy

coverage: $(VENV)/.installed
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

stress: $(VENV)/.installed
	SKLEARN_TRANSFER_STRESS=1 SKLEARN_TRANSFER_RELIABILITY=docs/reliability.md \
	$(BIN)/python -m pytest -q tests/stress

# Environments of their own, so that neither disturbs the other or .venv.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -q --upgrade pip
	$(VENV)-lowest/bin/python -m pip install -q -c tests/lowest.txt -e $(ALL)
	$(VENV)-lowest/bin/python -m pytest -q

test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q --upgrade pip
	$(VENV)-newest/bin/python -m pip install -q --upgrade \
		--upgrade-strategy eager -e $(ALL)
	$(VENV)-newest/bin/python -m pytest -q

bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[bench]"
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest
