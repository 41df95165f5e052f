# make quickstart   watch a small policy learn arithmetic        make test   run the tests
# Both make .venv once, from the pinned set that fits this machine; PYTHON names another interpreter to make it with.

PYTHON ?= python3

.PHONY: quickstart test test-gpu lint format setup

quickstart: setup
	.venv/bin/rlflow run recipes/quickstart.yaml

test: setup
	.venv/bin/python -m pytest -m "not gpu" $(TESTS)

test-gpu: setup
	.venv/bin/python -m pytest -m gpu $(TESTS)

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

setup:
	@$(PYTHON) requirements/setup_env.py
