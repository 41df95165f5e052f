"""References that rewards can use, and what is said of others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlflow.rewards.references import REFERENCE_CHECKS, Formula, reference_problem
from rlflow.rewards.resolving import REWARDS


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "",
        " ",
        "42",
        42,
        2e-05,
        True,
        "8:00",
        "June 8",
        r"\frac{1}{3}",
        "x = 5 or x = 6",
        r"x \equiv 3 \pmod{7}",
        "She makes 18.\n#### 18",
        r"long " * 200 + r"\boxed{4} and \boxed{6}",
        {"style": "rule", "ground_truth": "4"},
        ["4"],
    ],
)
def test_a_reference_that_can_be_read_has_no_problem(reference: object) -> None:
    assert reference_problem("math_accuracy", reference) is None


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("**", "states no answer"),
        ({"style": "rule"}, "is an object without `ground_truth` (it has style)"),
        ({}, "is an object without `ground_truth` (it has nothing)"),
        (["4", "5"], "is a list of 2, not one answer"),
        ([], "is a list of 0, not one answer"),
        (float("nan"), "is no finite number"),
        ("x" * 401, "has an answer of 401 characters, and 400 are the most"),
        ("?", "holds no letter and no digit"),
    ],
)
def test_a_reference_that_nothing_can_equal_has_one(reference: object, problem: str) -> None:
    assert reference_problem("math_accuracy", reference) == problem
    assert reference_problem("cosine", reference) == problem


@pytest.mark.parametrize("reference", ["1/0", "9^9^9", "5 = 6", r"\tan 90^\circ + 1/0"])
def test_a_reference_without_a_value_has_one(reference: str) -> None:
    assert "has no value" in str(reference_problem("math_accuracy", reference))


def test_what_only_math_verify_can_parse_is_returned_for_it() -> None:
    assert reference_problem("math_accuracy", r"\boxed{\sum_{k=1}^n k}") == Formula(r"\sum_{k=1}^n k")


def test_last_number_needs_a_number_and_exact_match_any_text() -> None:
    assert reference_problem("last_number", "seven") == "names no number"
    assert reference_problem("last_number", "#### 7") is None
    assert reference_problem("exact_match", "seven") is None
    assert reference_problem("exact_match", {"answer": "seven"}) is not None


def test_every_check_is_of_a_reward() -> None:
    assert set(REFERENCE_CHECKS) <= set(REWARDS)


def test_the_child_says_of_each_formula_whether_it_can_be_parsed() -> None:
    formulas = [r"\frac{1}{", r"\sum_{k=1}^n k", r"\sum_{k=1}^2 k + 9^{9^9}"]
    command = [sys.executable, "-m", "rlflow.rewards.reference_child"]
    child = subprocess.run(command, input=json.dumps(formulas), capture_output=True, text=True, timeout=60, check=True)
    assert child.stdout == "0\n1\n0\n"


def test_references_are_checked_without_sympy() -> None:
    code = "import sys, rlflow.rewards.references; assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
