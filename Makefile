# Two commands do everything: `make demo` and `make test`.
# The first interpreter that runs and fits; a name on the PATH may be a shim that does not run.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c '$(FITS)' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2

.PHONY: demo test fuzz check bench proto format clean
.DELETE_ON_ERROR:

# torch first and under its exact pin: an open range would pull gigabytes of CUDA libraries on
# machines that have a CPU build. DeepSpeed's build looks at the installed torch, hence no isolation.
$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(FITS)' >/dev/null 2>&1 \
	  || { echo "dualray needs Python 3.11 or 3.12 and found $$(python3 --version 2>&1); install one, or set PYTHON=/path/to/python3.12" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch numpy setuptools wheel
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal

# 100,000 hostile messages to a served model; takes some minutes and prints a summary line.
fuzz: $(VENV)/.installed
	FUZZ_MESSAGES=100000 $(BIN)/pytest --timeout 3600 tests/actors/test_fuzz.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m dualray.proto.generate --check

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/model.py

proto: $(VENV)/.installed
	$(BIN)/python -m dualray.proto.generate

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
