# make quickstart   watch a small policy learn arithmetic        make test   run the tests
# Both make .venv once, from the pinned set that fits this machine; PYTHON names another interpreter to make it with.

PYTHON ?= python3

.PHONY: quickstart test test-gpu oracles lint format setup

quickstart: setup
	.venv/bin/rlflow run recipes/quickstart.yaml

test: setup
	.venv/bin/python -m pytest -m "not gpu" $(TESTS)

test-gpu: setup
	.venv/bin/python -m pytest -m gpu $(TESTS)

# Every row against implementations that are not ours: docs/algorithms.md, "What each row is checked against".
oracles: setup
	.venv/bin/python -m pytest -v tests/rlflow/algorithms/test_trl_policy_oracles.py \
		tests/rlflow/algorithms/test_trl_preference_oracles.py \
		tests/rlflow/algorithms/test_gradients_against_finite_differences.py

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

setup:
	@$(PYTHON) requirements/setup_env.py
