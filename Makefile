# From a fresh clone with Python 3.11 and make: `make demo` or `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= demo

.PHONY: demo test docs lint types wheel check format gpu-check clean

demo: $(INSTALLED)  ## build the embedded data, train on it, evaluate, write a report
	$(BIN)/neuclip demo --out $(DEMO)

# Without bytecode, which containers often turn off, every process that a test starts compiles.
test: $(INSTALLED)  ## the whole test suite
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadgroup -q

docs: $(VENV)/.docs  ## the documentation site, in site/: fails on a broken link or anchor
	$(BIN)/python scripts/reference_pages.py
	$(BIN)/zensical build --strict --clean
	$(BIN)/python scripts/check_site.py site
	@echo 'site/ is complete. To view it with search: $(BIN)/python -m http.server --directory site'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

wheel: $(INSTALLED)  ## build the wheel, and run it with no repository beside it
	scripts/check_wheel.sh $(BIN)/python

check: lint types docs wheel test  ## what CI runs

gpu-check: $(INSTALLED)  ## checks and measures a GPU in eight minutes, results in gpu_check/
	PYTHON=$(BIN)/python scripts/gpu_check.sh --out gpu_check

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A second call finds the stamp newer than what it depends on, and installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neuclip needs Python 3.11 or newer; call make with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
