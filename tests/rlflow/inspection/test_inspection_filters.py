from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlflow.tracking.filters import FilterError, filter_records, sort_records
from rlflow.tracking.rollouts import RolloutRecord


def make_record(sample: int, **given: Any) -> RolloutRecord:
    nothing = np.zeros(0, dtype=np.int32)
    fields: dict[str, Any] = {
        "prompt_id": "set:1",
        "epoch": 0,
        "prompt": "1+1=",
        "messages": [],
        "completion": "two",
        "reward": 0.0,
        "rewards": {},
        "error": "",
        "advantage": 0.0,
        "policy_version": 3,
        "finish_reason": "stop",
        "state": "trained",
        "prompt_token_ids": nothing,
        "token_ids": nothing,
        "is_sampled": nothing,
        "logprobs": nothing,
        "versions": nothing,
        "step": 12,
    }
    return RolloutRecord(sample_index=sample, **fields | given)


RECORDS = [
    make_record(
        0,
        reward=1.0,
        rewards={"math_accuracy": 1.0, "a-b.v2": 0.25},
        num_tokens=10,
        columns={"answer": "72", "level": 5, "step": "of the data", "odd name": 1},
    ),
    make_record(
        1,
        reward=math.nan,
        rewards={"math_accuracy": math.nan, "a-b.v2": 0.75},
        error="math_accuracy: it raised",
        num_tokens=30,
        finish_reason="length",
        completion='It\'s "so" reward/x',
    ),
    make_record(2, reward=-2.0, rewards={"math_accuracy": 0.0, "a-b.v2": 0.5}, num_tokens=20, columns={"answer": "7"}),
]


def found(where: str) -> list[int]:
    return [record.sample_index for record in filter_records(RECORDS, where)]


@pytest.mark.parametrize(
    ("where", "samples"),
    [
        ("reward/math_accuracy < 0.5", [2]),
        ("reward/math_accuracy < 0.5 or finish_reason == 'length'", [1, 2]),
        ("reward/a-b.v2 >= 0.5 and not reward < 0", [1]),
        ("reward / 2 <= -1", [2]),
        ("num_tokens-10 > 5", [1, 2]),
        ("10 < num_tokens <= 30", [1, 2]),
        ("reward is None", [1]),
        ("reward != None", [0, 2]),
        ("error", [1]),
        ("'raised' in error and matches(error, '^math')", [1]),
        ("answer == '72'", [0]),
        ("answer in ['7', '72']", [0, 2]),
        ("answer not in ['7']", [0]),
        ("number(answer) < 10", [2]),
        ("len(answer) == 1", [2]),
        ("level > 3", [0]),
        ("step == 12", [0, 1, 2]),
        ("column/step == 'of the data'", [0]),
        ("column/odd name == 1", [0]),
        ("completion == 'It\\'s \"so\" reward/x'", [1]),
        ("'reward/x' in completion", [1]),
        ('lower(finish_reason) == "stop" and abs(reward) == 2', [2]),
        ("True", [0, 1, 2]),
    ],
)
def test_a_condition_holds_for_the_rollouts_it_says(where: str, samples: list[int]) -> None:
    assert found(where) == samples


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("reward/math_acuracy < 1", r"there is no 'reward/math_acuracy' \(did you mean 'reward/math_accuracy'\?\)"),
        ("rewards < 1", r"there is no 'rewards' \(did you mean 'reward'\?\); there are step, reward"),
        ("reward <", "is no condition"),
        ("reward = 1", "is no condition"),
        ("", "is no condition"),
        ("answer < 5", r"compares the text '72' with 5: write a text in quotes, or number\(\.\.\.\)"),
        ("answer + 1 > 5", "calculates with '72' and 1: only numbers can be"),
        ("'ab' * 1000000000 == ''", "only numbers can be"),
        ("number(completion) > 1", "cannot be evaluated: could not convert string to float: 'two'"),
        ("level / 0 > 1", "cannot be evaluated"),
        ("matches(completion, '(')", "cannot be evaluated"),
        ("__import__('os')", "only len"),
        ("().__class__.__bases__", "attribute is not allowed"),
        ("[x for x in prompt]", "list comp is not allowed"),
        ("lambda: 1", "lambda is not allowed"),
        ("completion[0] == 'x'", "subscript is not allowed"),
        ("f'{reward}' == ''", "joined str is not allowed"),
        ("9 ** 9 ** 9 > 1", "pow is not allowed"),
        ("reward if True else 1", "if exp is not allowed"),
        ("len(prompt, key=1)", "keyword is not allowed"),
        ("(reward := 5)", "named expr is not allowed"),
        ("len.x", "attribute is not allowed"),
        ("2 in 5", "2 cannot be `in` 5"),
        ("-" * 1900 + "1", "nested too deeply"),
        ("(" * 500 + "1" + ")" * 500, "is no condition"),
        ("1 + " * 1000 + "1", "a condition of 4,001 characters"),
    ],
)
def test_what_is_no_condition_is_named_and_never_run(where: str, said: str) -> None:
    with pytest.raises(FilterError, match=said):
        found(where)


def test_rollouts_are_sorted_and_those_without_a_value_are_last() -> None:
    assert [record.sample_index for record in sort_records(RECORDS, "reward")] == [2, 0, 1]
    assert [record.sample_index for record in sort_records(RECORDS, "reward", is_falling=True)] == [0, 2, 1]
    assert [record.sample_index for record in sort_records(RECORDS, "-num_tokens")] == [1, 2, 0]
    assert sort_records([], "reward/gone") == [] == filter_records([], "reward == 1")
    mixed = [make_record(0, columns={"key": 1}), make_record(1, columns={"key": "a"})]
    with pytest.raises(FilterError, match="its values are of several kinds"):
        sort_records(mixed, "key")
