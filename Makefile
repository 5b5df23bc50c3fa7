# Two commands: `make demo` goes from nothing to pictures, `make test` runs every check. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 12
PEER ?= /tmp/d2p
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test browser chaos bench format pins clean

demo: STARTED := $(shell date +%s)
demo: $(VENV)/.installed-demo
	@$(BIN)/python jobs/demo.py --set minutes=$(MINUTES) --set started_at=$(STARTED)

test: $(VENV)/.installed-dev browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/parity --numprocesses=logical --dist=loadfile
	$(BIN)/python -m pytest tests/distributed tests/cluster tests/e2e

# The playground's tests want a Chromium; they are left out where there is none and nobody may install one.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || echo "no chromium: the playground's tests are skipped"

# Whole runs on clusters of several nodes that lose nodes, disks and stores; docs/faults.md has what came of it.
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/chaos

# Ours and the peers', on a machine that does nothing else; benchmarks/README.md says how to make dalle2-pytorch's environment.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.networks --results benchmarks/results $(if $(wildcard $(PEER)/bin/python),--peer-python $(PEER)/bin/python)
	$(BIN)/python -m benchmarks.report

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pins come from requirements.txt; an extra chooses which of them are installed. Compiled bytecode halves every start of Ray.
$(VENV)/.installed-%: pyproject.toml requirements.txt | $(BIN)/uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --compile-bytecode --constraint requirements.txt --editable '.[$*]'
	@touch $@

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv

# After a change of dependencies: resolves them anew for every supported Python.
pins: | $(BIN)/uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header --quiet --output-file requirements.txt

clean:
	rm -rf $(VENV) runs build
