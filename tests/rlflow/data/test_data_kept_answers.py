"""Which answers are kept, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlflow.data.kept_answers import keep_answers, require_condition
from rlflow.inspection.selection import distinct
from rlflow.recipe.sample_blocks import KeepBlock
from rlflow.tracking.filters import FilterError, filter_records
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


def called(word: str, said: str = "done", **given: Any) -> RolloutRecord:
    """An episode that calls f with a word, and says something then."""
    call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": f"f {word}"}}]}
    messages = (call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": said})
    episode = Episode(messages, num_turns=2, reward=0.5, counts={"tool_calls": 1, "tool_errors": int(word == "bad")})
    return answer("a", said, 1.0, **{"episode": episode} | given)


def test_what_is_exported_is_said_once_and_has_a_turn_to_learn_from():
    records = [
        called("good"),
        called("bad"),
        called("good", epoch=1),
        called("silent", " "),
        called("cut", finish_reason="length"),
        answer("a", "cut", 1.0, finish_reason="length"),
        answer("a", "one", 1.0),
    ]
    assert distinct(records) == [records[0], records[1], records[4], records[6]]


def test_a_condition_names_the_turns_the_reward_and_the_counts_of_an_episode():
    records = [called("good"), called("bad")]
    assert filter_records(records, "environment/tool_errors == 0 and num_turns == 2") == records[:1]
    assert filter_records(records, "environment_reward < 0.5") == []
    assert filter_records([answer("a", "one", 1.0)], "num_turns > 1 or environment_reward > 0") == []
    with pytest.raises(FilterError, match=r"there is no .environment/tool_error. .*.environment/tool_errors."):
        filter_records(records, "environment/tool_error == 0")
    keep = KeepBlock(where="environment/tool_errors == 0")
    assert [row["messages"][1]["tool_calls"][0]["function"]["name"] for row in keep_answers(records, keep).rows] == [
        "f good"
    ]
    require_condition(keep, [], ["solution"])


def test_the_account_counts_what_became_of_all_answers():
    account = keep_answers(ANSWERS, KeepBlock(where="reward > 0.5", at_most=1)).account
    assert account == "10 answers, 6 of them scored, whole and said once, 4 good: 2 rows"
