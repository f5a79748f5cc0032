# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test long chaos lint types kernels coverage format bench serve proto embedded clean

demo: $(VENV)/installed kernels
	$(BIN)/octet demo

# What needs one core runs beside another of its kind; clusters have both cores for themselves, and those that several
# tests share end with the last of them (`tests/conftest.py`).
test: $(VENV)/installed-test
	$(MAKE) --jobs 2 --output-sync lint types kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/unit tests/numerics tests/gpu
	$(BIN)/python -m pytest tests/cluster tests/scaling tests/chaos

# Numba compiles once; afterwards every process finds the code in its cache.
kernels: $(VENV)/installed
	$(BIN)/python -m ops.compile

coverage: $(VENV)/installed-test kernels
	$(BIN)/python -m pytest --cov --cov-report=term

# What takes longer than it tells more, and is not run every time.
long: $(VENV)/installed-test kernels
	$(BIN)/python -m pytest -m long

chaos: $(VENV)/installed kernels
	$(BIN)/octet chaos run --seed 0 --count 200 --html chaos.html --json chaos.json

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-test
	$(BIN)/octet bench memory
	$(BIN)/octet bench lane

serve: $(VENV)/installed
	$(BIN)/octet serve

proto: $(VENV)/installed-test
	$(BIN)/python -m grpc_tools.protoc -I . octet/v1/octet.proto --python_out=. --grpc_python_out=. --pyi_out=.

embedded: $(VENV)/installed-test
	$(BIN)/python -m ops.embedded

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Octet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed
