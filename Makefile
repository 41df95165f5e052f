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

# Every row against implementations that are not ours, and against numbers worked out by hand: docs/algorithms.md, "What
# each row is checked against".
ORACLES := $(addprefix tests/rlflow/algorithms/test_, trl_policy_oracles.py trl_preference_oracles.py \
	torchrl_oracles.py gradients_against_finite_differences.py advantages.py policy_losses.py preference_losses.py \
	reductions.py objectives_by_hand.py objectives.py aot.py)

oracles: .venv/oracles/.complete
	PYTHONPATH=.venv/oracles .venv/bin/python -m pytest -v $(ORACLES)

.venv/oracles/.complete: requirements/oracles.txt | setup
	rm -rf .venv/oracles
	.venv/bin/python -m pip install --quiet --no-deps --target .venv/oracles -r requirements/oracles.txt
	touch $@

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

format: setup
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

setup:
	@$(PYTHON) requirements/setup_env.py
