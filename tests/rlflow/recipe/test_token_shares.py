"""Whether ranks can share a model's tokens, by its config."""

from __future__ import annotations

import pytest

from rlflow.recipe.token_shares import heads_problem, sharing_problem


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "ranks"), [(32, 8, 1), (32, 8, 8), (32, 8, 32), (9, 3, 3), (9, 3, 9), (8, 1, 4)]
)
def test_heads_that_divide_or_have_copies_for_every_rank_are_fine(heads, key_value_heads, ranks):
    assert heads_problem(heads, key_value_heads, ranks) is None


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "ranks", "possible"),
    [(9, 3, 2, "1, 3, 9"), (14, 2, 4, "1, 2, 14"), (12, 4, 6, "1, 2, 4, 12"), (32, 8, 64, "1, 2, 4, 8, 16, 32")],
)
def test_the_message_names_the_numbers_of_ranks_that_are_possible(heads, key_value_heads, ranks, possible):
    assert heads_problem(heads, key_value_heads, ranks) == (
        f"{heads} attention heads and {key_value_heads} key-value heads do not divide over {ranks} ranks: set "
        f"trainer.sequence_parallel to one of {possible}"
    )


def test_heads_are_found_under_their_many_names():
    assert sharing_problem({"num_attention_heads": 4}, 2) is None
    for config in ({"num_attention_heads": 3}, {"n_head": 3}, {"text_config": {"num_attention_heads": 3}}):
        assert "3 attention heads and 3 key-value heads" in str(sharing_problem(config, 2))
    assert "3 attention heads and 1 key-value" in str(
        sharing_problem({"num_attention_heads": 3, "num_key_value_heads": 1}, 2)
    )
    assert sharing_problem({"hidden_size": 8}, 2) is None


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_a_rotary_embedding_that_depends_on_the_longest_sequence_is_refused(rotary):
    assert "depends on the longest sequence" in str(sharing_problem({"num_attention_heads": 4, **rotary}, 2))


def test_a_rotary_embedding_of_positions_alone_is_fine():
    yarn = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": None}
    assert sharing_problem({"num_attention_heads": 4, **yarn}, 2) is None


def test_a_model_that_is_run_one_sequence_at_a_time_cannot_be_shared():
    config = {"model_type": "qwen3_next", "num_attention_heads": 4}
    for given in (config, {"model_type": "of_pictures", "text_config": config}):
        assert "ranks can share what attention alone mixes" in str(sharing_problem(given, 2))
