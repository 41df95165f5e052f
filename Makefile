# make quickstart   watch a small policy learn arithmetic
# make quickstart-images   a small vision-language model learns to read digits; needs torchvision and scikit-learn, which it installs apart
# make check        the quick round: tests without Ray, vLLM and several ranks, lint, types
# make test         all tests but those that need a GPU
# make optional     tests of pictures and of whole texts, with torchvision, scikit-learn and sentence-transformers in .venv/optional
# make docs         the documentation as a site, in site/; make docs-serve shows it at http://127.0.0.1:8000 and follows edits
# make gpu-check    on a machine with a GPU: right numbers, a run that learns, speed and memory, in eight minutes
# Each but docs makes .venv once, from the pinned set that fits this machine; PYTHON names another interpreter to make it with.

PYTHON ?= python3
# Tests run in as many processes as there are cores, at most eight; those of a file in one, as they share what is slow to
# make. Files start in the order of tests/conftest.py, in which the longest come first.
PYTEST := .venv/bin/python -m pytest
IN_PARALLEL := --numprocesses $(shell n=$$(nproc); echo $$((n < 8 ? n : 8))) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart check quick test test-gpu gpu-check oracles optional quickstart-images docs docs-serve lint format setup

quickstart: setup
	.venv/bin/rlflow run recipes/quickstart.yaml

check:
	@$(MAKE) --no-print-directory --jobs 2 lint quick

quick: setup
	$(PYTEST) $(IN_PARALLEL) -m "not ray and not slow and not gpu" $(TESTS)

test: setup
	$(PYTEST) $(IN_PARALLEL) -m "not gpu" $(TESTS)

test-gpu: setup
	$(PYTEST) -m gpu $(TESTS)

# Every row against implementations that are not ours, and against numbers worked out by hand: docs/algorithms.md, "What
# each row is checked against".
ORACLES := $(addprefix tests/rlflow/algorithms/test_, trl_policy_oracles.py trl_preference_oracles.py \
	torchrl_oracles.py gradients_against_finite_differences.py advantages.py policy_losses.py preference_losses.py \
	reductions.py objectives_by_hand.py objectives.py aot.py)

gpu-check: setup
	.venv/bin/python benchmarks/gpu_check --output runs/gpu_check

oracles: .venv/oracles/.complete
	PYTHONPATH=.venv/oracles $(PYTEST) -v $(ORACLES)

.venv/oracles/.complete: requirements/oracles.txt | setup
	rm -rf .venv/oracles
	.venv/bin/python -m pip install --quiet --no-deps --target .venv/oracles -r requirements/oracles.txt
	touch $@

# Pictures, and what sentence-transformers and scikit-learn say: a part of `make test` skips where they are missing.
OPTIONAL := $(addprefix tests/,$(addprefix actors/,rollout_engines/test_engine_pictures.py test_bases_of_eight_bits.py \
	test_reranker_gradients.py test_seeing_classifiers.py test_tower_memory.py train_engines/test_pictures.py) \
	$(addprefix rlflow/,algorithms/test_sequence_losses.py cli/test_cli_pictures.py data/test_data_audios.py \
	data/test_data_digits.py data/test_data_image_processor.py data/test_data_image_rows.py data/test_data_new_model.py \
	data/test_data_videos.py \
	driver/test_driver_pictures.py driver/test_driver_seeing_classifiers.py driver/test_driver_sequences.py \
	quantization/test_fitted_schemes.py serving/test_serving_commands.py serving/test_serving_pictures.py))

quickstart-images: .venv/optional/.complete
	PYTHONPATH=.venv/optional .venv/bin/rlflow run recipes/quickstart_images.yaml

optional: .venv/optional/.complete
	PYTHONPATH=.venv/optional $(PYTEST) $(IN_PARALLEL) -m "not gpu" $(OPTIONAL)

.venv/optional/.complete: requirements/optional.txt | setup
	rm -rf .venv/optional
	.venv/bin/python -m pip install --quiet --no-deps --target .venv/optional -r requirements/optional.txt
	touch $@

# Needs nothing of .venv: an environment of its own in build/docs.
MKDOCS := NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs

docs: build/docs/.complete
	$(MKDOCS) build --strict

docs-serve: build/docs/.complete
	$(MKDOCS) serve

build/docs/.complete: requirements/docs.txt
	rm -rf build/docs
	$(PYTHON) -m venv build/docs
	build/docs/bin/pip install --quiet --disable-pip-version-check -r requirements/docs.txt
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
