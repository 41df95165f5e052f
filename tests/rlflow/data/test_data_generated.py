"""The arithmetic problems: complete, disjoint, right."""

from __future__ import annotations

import pytest

from rlflow.data.errors import DataError
from rlflow.data.generated import arithmetic


def prompts(**args):
    return [row["prompt"] for row in arithmetic(**args)]


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
@pytest.mark.parametrize("digits", [1, 2])
def test_train_and_heldout_are_disjoint_and_together_every_problem(operators, digits):
    train, heldout = (prompts(operators=operators, digits=digits, split=split) for split in ("train", "heldout"))
    size = 10**digits
    assert set(train).isdisjoint(heldout)
    assert set(train) | set(heldout) == {f"{a}{op}{b}=" for a in range(size) for op in operators for b in range(size)}
    assert len(train) + len(heldout) == len(operators) * size * size


def test_the_held_out_share_is_what_was_asked_for():
    assert len(arithmetic(digits=2, split="heldout")) == pytest.approx(1000, abs=100)
    assert len(arithmetic(digits=2, split="heldout", heldout_fraction=0.4)) == pytest.approx(4000, abs=200)


@pytest.mark.parametrize("op", "+*")
def test_both_orders_of_a_sum_or_product_are_in_one_split(op):
    heldout = set(prompts(operators=op, split="heldout", template="{a} {op} {b}"))
    assert heldout == {" ".join(reversed(prompt.split(" "))) for prompt in heldout}


def test_a_problem_is_in_the_same_split_whatever_the_digits_operators_and_seed():
    small = set(prompts(digits=1, split="heldout"))
    large = set(prompts(operators="-+", digits=2, split="heldout", seed=5))
    assert small and small <= large


@pytest.mark.parametrize(
    ("operators", "problem", "answer"), [("+", "12+34=", "46"), ("-", "12-34=", "-22"), ("*", "12*34=", "408")]
)
def test_the_answer_is_the_response_and_the_solution(operators, problem, answer):
    rows = [row for split in ("train", "heldout") for row in arithmetic(operators, split=split)]
    assert [row for row in rows if row["prompt"] == problem] == [
        {"prompt": problem, "response": answer, "solution": answer}
    ]


def test_the_template_shapes_the_prompt():
    rows = arithmetic(digits=1, template="What is {a} + {b}?")
    assert {"prompt": "What is 2 + 3?", "response": "5", "solution": "5"} in rows + arithmetic(
        digits=1, split="heldout", template="What is {a} + {b}?"
    )


def test_rows_draws_that_many_distinct_problems_by_the_seed():
    first, again, other = (prompts(rows=50, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 50


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"operators": "/"}, "any of"),
        ({"operators": ""}, "any of"),
        ({"digits": 4}, "from 1 to 3"),
        ({"split": "test"}, "train or heldout"),
        ({"heldout_fraction": 1.0}, "between 0 and 1"),
        ({"operators": "+-", "template": "{a}+{b}="}, "{op}"),
        ({"template": "{a}{c}{b}"}, "needs {a} and {b}"),
        ({"rows": 10**6}, "but train has 9"),
    ],
)
def test_arguments_out_of_range_are_named(args, says):
    with pytest.raises(DataError, match=says):
        arithmetic(**args)
