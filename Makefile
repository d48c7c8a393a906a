# Needs git, make and Python 3.11 to 3.13. Everything else comes with `make`, hash-checked, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	--no-header --quiet

.PHONY: help demo test test-unit lint format proto bench gpu-check up lock secrets clean

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

gpu-check: $(READY)  ## Show that this host's GPU trains and serves, in bfloat16 too.
	@$(BIN)/python -m services.gpu_check

up: $(READY)  ## Run the whole system on this machine.
	$(BIN)/tandem up

# Those of the images begin as copies of the whole one, whose versions uv then keeps.
lock:  ## Compile requirements.lock, and those of the images, from pyproject.toml (needs uv).
	$(COMPILE) pyproject.toml --group dev --extra s3 --output-file requirements.lock
	for image in installer torch trainer inference cli; do \
		cp requirements.lock requirements/$$image.lock && \
		$(COMPILE) --group $$image --output-file requirements/$$image.lock || exit 1; \
	done

secrets: secrets/redis_password  ## Make the broker's password for compose.yaml, once.

# The directory keeps others of this host out; within containers the file is read by users who do not own it.
secrets/redis_password:
	@install -d -m 700 secrets
	@head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' | install -m 444 /dev/stdin $@
	@echo "$@ is the broker's password from now on"

clean:  ## Remove the environment and caches; the demo's models in .demo stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(READY): requirements.lock pyproject.toml scripts/setup
	@scripts/setup "$(PYTHON)" $(VENV)
	@touch $@
