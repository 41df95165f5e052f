"""Which answers are kept, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlflow.data.kept_answers import keep_answers
from rlflow.recipe.sample_blocks import KeepBlock
from rlflow.tracking.rollouts import RolloutRecord
from rlflow.types import Episode


def answer(prompt: str, said: str, reward: float, **given: Any) -> RolloutRecord:
    nothing = np.zeros(0, dtype=np.int32)
    fields: dict[str, Any] = {
        **{"prompt_id": prompt, "epoch": 0, "sample_index": 0, "prompt": prompt, "completion": said, "reward": reward},
        **{"messages": [{"role": "user", "content": prompt}], "rewards": {}, "error": "", "advantage": math.nan},
        **{"policy_version": 0, "finish_reason": "stop", "state": "sampled", "columns": {"id": 3, "solution": "4"}},
        **{"prompt_token_ids": nothing, "token_ids": nothing, "is_sampled": nothing, "logprobs": nothing},
    }
    return RolloutRecord(versions=nothing, **fields | given)


ANSWERS = [
    answer("a", "one", 0.2),
    answer("a", "two", 0.9),
    answer("a", "two", 0.9, epoch=1),
    answer("a", "three", 0.6),
    answer("a", "four", 1.0, finish_reason="length"),
    answer("a", "five", 0.9),
    answer("b", "six", math.nan),
    answer("b", "seven", 0.7),
    answer("b", " ", 1.0),
    answer("b", "eight", 0.1),
]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, ["two", "five", "three", "one", "seven", "eight"]),
        ({"where": "reward > 0.5"}, ["two", "five", "three", "seven"]),
        ({"where": "reward > 0.5", "at_most": 2}, ["two", "five", "seven"]),
        ({"at_most": 1}, ["two", "seven"]),
        ({"where": "reward > 0.5", "at_least": 2, "at_most": 1}, ["two"]),
        ({"where": "reward > 2"}, []),
    ],
)
def test_distinct_whole_answers_that_are_good_are_kept_the_best_of_each_prompt_first(
    keep: dict[str, Any], expected: list[str]
):
    rows = keep_answers(ANSWERS, KeepBlock(**keep)).rows
    assert [row["messages"][-1]["content"] for row in rows] == expected
    assert all(row["solution"] == "4" and "id" not in row for row in rows)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, [("two", "one"), ("seven", "eight")]),
        ({"at_most": 5}, [("two", "one"), ("five", "three"), ("seven", "eight")]),
        ({"where": "reward > 0.8", "at_most": 5}, [("two", "one"), ("five", "three")]),
        ({"at_least": 3}, [("two", "one")]),
    ],
)
def test_pairs_are_the_best_and_the_worst_then_the_second_best_and_the_second_worst(
    keep: dict[str, Any], expected: list[tuple[str, str]]
):
    rows = keep_answers(ANSWERS, KeepBlock(form="pairs", **keep)).rows
    said = [(row["chosen_messages"][-1]["content"], row["rejected_messages"][-1]["content"]) for row in rows]
    assert said == expected


def test_an_episode_with_a_turn_that_says_nothing_is_not_kept():
    calls: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    spoken = [calls, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}]
    silent = [*spoken[:2], {"role": "assistant", "content": " "}]
    episodes = [Episode(tuple(said)) for said in (spoken, silent)]
    (row,) = keep_answers([answer("a", "4", 1.0, episode=episode) for episode in episodes], KeepBlock()).rows
    assert row["messages"][1:] == spoken


def test_the_account_counts_what_became_of_all_answers():
    account = keep_answers(ANSWERS, KeepBlock(where="reward > 0.5", at_most=1)).account
    assert account == "10 answers, 6 of them scored, whole and said once, 4 good: 2 rows"
