# Needs git, make and Python 3.11 to 3.13. Everything else comes with `make`, hash-checked, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-unit lint format proto bench up lock clean

help:  ## Say what there is to make.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY)  ## Train, serve, classify, compare and generate; IMAGES=folder TEXT=file take your own data.
	@TANDEM_HOME="$(CURDIR)/.demo" $(BIN)/tandem demo \
		$(if $(IMAGES),--images "$(IMAGES)") $(if $(TEXT),--text "$(TEXT)") $(if $(RETRAIN),--retrain)

# In the order of the folders: by default files with few tests come last, and those are the long ones.
test: $(READY)  ## Run all tests, as many at once as there are cores.
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test-unit: $(READY)  ## Run the tests that need no socket; seconds.
	$(BIN)/pytest tests/unit

lint: $(READY)  ## Check style, types, the house's rules, that the generated code is fresh, and deploy/kubernetes by schema.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@scripts/check-proto $(BIN)/python
	$(BIN)/python scripts/check_kubernetes.py

format: $(READY)  ## Put the code into shape.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(READY)  ## Generate tandem/wire/v1 and tandem/wire/oip from proto/.
	scripts/generate-proto $(BIN)/python .

bench: $(READY)  ## Run the benchmarks; figures go to the terminal.
	$(BIN)/python -m benchmarks

up: $(READY)  ## Run the whole system on this machine.
	$(BIN)/tandem up

lock:  ## Compile requirements.lock from pyproject.toml (needs uv).
	uv pip compile pyproject.toml --group dev --extra s3 --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock

clean:  ## Remove the environment and caches; the demo's models in .demo stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(READY): requirements.lock pyproject.toml scripts/setup
	@scripts/setup "$(PYTHON)" $(VENV)
	@touch $@
