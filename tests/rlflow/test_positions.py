"""The longest sequence of a model and of a recipe, by hand and beside transformers' own configs."""

from __future__ import annotations

from typing import Any

import pytest

from rlflow.positions import _DEFAULTS, longest_sequences, position_limit
from rlflow.recipe import Recipe

LENGTH = "data.max_prompt_tokens + rollout.max_new_tokens"


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 7}, 4096),
        ({"model_type": "opt"}, 2048),
        ({"model_type": "mamba"}, None),
        # Linear and dynamic scaling multiply the number of positions, under the old key and under the new one.
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2}}, 4096),
        # These have the factor in max_position_embeddings already.
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 32768),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 32768),
        # Gemma 3 says of its global layers linear, and its positions are scaled all the same.
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            },
            131072,
        ),
    ],
)
def test_a_models_limit_is_its_positions_with_the_scaling_that_is_not_in_them_yet(
    config: dict[str, Any], limit: int | None
):
    assert position_limit(config) == limit


def test_limits_that_a_config_does_not_say_are_those_of_transformers():
    from transformers import CONFIG_MAPPING

    for model_type, limit in _DEFAULTS.items():
        assert position_limit(CONFIG_MAPPING[model_type]().to_dict()) == limit, model_type


def test_a_recipe_is_as_long_as_its_prompts_and_completions_or_as_its_examples():
    def lengths(**blocks: Any) -> dict[str, int]:
        data = {"train": {"generator": "arithmetic"}, "max_prompt_tokens": 100, "max_tokens": 300}
        given = {"model": {"path": "org/model"}, "data": data, "run": {"steps": 1}, **blocks}
        return longest_sequences(Recipe.model_validate(given))

    rewards, rollout = [{"name": "exact_match"}], {"max_new_tokens": 20}
    assert lengths(algorithm={"name": "grpo", "group_size": 2}, rewards=rewards, rollout=rollout) == {LENGTH: 120}
    assert lengths(algorithm={"name": "sft"}) == {"data.max_tokens": 300}
    held_out = {"data": {"generator": "arithmetic"}, "reward": rewards[0], "max_new_tokens": 50}
    assert lengths(algorithm={"name": "sft"}, rollout=rollout, evaluation=held_out) == {
        "data.max_tokens": 300,
        LENGTH: 120,
        "data.max_prompt_tokens + evaluation.max_new_tokens": 150,
    }
