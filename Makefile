# Two commands: `make demo` goes from nothing to pictures, `make test` runs every check. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 12
PEER ?= /tmp/d2p
VARIANT ?= cuda
BUILT := build/image/$(VARIANT)
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test docs browser promtool chaos bench format pins manifests image image-check sbom audit clean

demo: STARTED := $(shell date +%s)
demo: $(VENV)/.installed-demo
	@$(BIN)/python jobs/demo.py --set minutes=$(MINUTES) --set started_at=$(STARTED)

test: $(VENV)/.installed-dev browser promtool
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/parity tests/k8s tests/docs --numprocesses=logical --dist=loadfile --durations=10
	$(BIN)/python -m pytest tests/distributed tests/cluster tests/e2e --durations=25

# The site of docs/, into build/site; a broken link ends it. `tests/docs` builds it too.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The playground's tests want a Chromium; they are left out where there is none and nobody may install one.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || echo "no chromium: the playground's tests are skipped"

# The tests of alerts want Prometheus's promtool, and are left out where there is none in the same way.
promtool:
	@command -v promtool >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get install -y -qq --no-install-recommends prometheus >/dev/null; } || echo "no promtool: the tests of alerts are skipped"

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

# What `kubectl apply -f k8s/` applies, after a change of its sources; kubectl has kustomize built in.
manifests:
	@{ echo '# The platform on standard hardware. Made by `make manifests` from k8s/platform: change that, not this.'; \
		kubectl kustomize k8s/platform; } > k8s/platform.yaml.new
	@mv k8s/platform.yaml.new k8s/platform.yaml

# docs/image.md. BASE names Debian with its digest, IMAGE what is pushed.
image:
	@case "$(BASE)" in *@sha256:*) ;; *) echo "BASE = '$(BASE)': must be debian:bookworm-slim@sha256:…" >&2; exit 2 ;; esac
	docker buildx build --file k8s/image/Dockerfile --build-arg BASE=$(BASE) --build-arg VARIANT=$(VARIANT) \
		--build-arg REVISION=$(shell git rev-parse HEAD) --build-arg SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct) \
		--provenance=mode=max --sbom=true --output type=image,name=$(IMAGE),push=true,rewrite-timestamp=true .

# The image's steps without Docker: an environment of the pins, the operators, the wheel, every command, the list of parts.
image-check: sbom
	mkdir -p $(BUILT)/opt && cp -r jobs $(BUILT)/opt
	PATH=$(abspath $(BUILT))/venv/bin:/usr/bin:/bin k8s/image/smoke.sh $(BUILT)/opt
	du -sh $(BUILT)/venv

# The packages in the image with versions and licences, as CycloneDX JSON.
sbom: $(BUILT)/.installed
	uv run --quiet --no-project --with cyclonedx-bom==7.5.0 k8s/image/sbom.sh $(BUILT)/venv $(BUILT)/sbom.json

$(BUILT)/.installed: pyproject.toml requirements.txt $(wildcard k8s/image/*) $(shell find platform -name '*.py') | $(BIN)/uv
	rm -rf $(BUILT) && mkdir -p $(BUILT)
	k8s/image/install_packages.sh $(VARIANT) $(BUILT)/venv c2pa,demo,mlflow,otel,wandb
	k8s/image/build_ops.sh $(VARIANT) $(BUILT)/venv
	k8s/image/build_wheel.sh $(BUILT)/wheel
	uv pip install --quiet --python $(BUILT)/venv --no-deps --compile-bytecode $(BUILT)/wheel/*.whl
	@touch $@

# Vulnerabilities of the pins, secrets in the tree, Dockerfile and manifests; docs/security.md.
audit: $(VENV)/.installed-dev
	k8s/audit/audit.sh

# After a change of dependencies: resolves them anew for every supported Python.
pins: | $(BIN)/uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header --quiet --output-file requirements.txt

clean:
	rm -rf $(VENV) runs build
