# The two commands: `make demo` and `make test`. Both start from nothing but Python 3.11 or later, with venv and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test lint docs bench clean

demo: .venv/demo
	$(BIN)/anabranch run examples/flights.toml

serve: .venv/serve
	$(BIN)/anabranch serve examples/payment_routing.toml

test: .venv/test
	scripts/servers
	$(BIN)/anabranch fetch smollm2
	JAX_COMPILATION_CACHE_DIR=$${JAX_COMPILATION_CACHE_DIR:-$(CURDIR)/.cache/jax} $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/dev
	$(BIN)/python docs/methods.py && $(BIN)/mkdocs build --strict

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -e '.[$*]'
	touch $@

clean:
	rm -rf .venv out site .cache
