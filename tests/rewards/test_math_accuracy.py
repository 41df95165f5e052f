"""Verdicts on answers as models write them, on published answers, and on answers made to stall a verifier."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from math_verify.errors import TimeoutException
from near_answers import NEAR_ANSWERS
from right_answers import RIGHT_ANSWERS
from wrong_answers import WRONG_ANSWERS

from rlflow.rewards.cosine import cosine
from rlflow.rewards.math_accuracy import math_accuracy

# math-verify keeps time with SIGALRM, which takes it from pytest-timeout's other method.
pytestmark = pytest.mark.timeout(300, method="thread")
DOCS = Path(__file__).parents[2] / "docs/rewards.md"


def verdict(completion: str, solution: object, timeout_s: int = 60, **options: object) -> float | None:
    return math_accuracy([None], [completion], [[]], [solution], timeout_s=timeout_s, **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("completion", "solution"), RIGHT_ANSWERS)
def test_an_equal_answer_scores_one(completion: str, solution: object) -> None:
    assert verdict(completion, solution) == 1.0


@pytest.mark.parametrize(("completion", "solution"), WRONG_ANSWERS + NEAR_ANSWERS)
def test_another_answer_scores_zero(completion: str, solution: object) -> None:
    assert verdict(completion, solution) == 0.0


def test_the_examples_of_the_documentation_are_true() -> None:
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \| ([01]) \|$", DOCS.read_text(), re.MULTILINE)
    assert len(rows) > 15
    assert [(c, s, verdict(c, s)) for c, s, _ in rows] == [(c, s, float(reward)) for c, s, reward in rows]


HEDGES = [
    "The answer is {} or {}.",
    r"\boxed{{{}}} or \boxed{{{}}}",
    r"\boxed{{{}}}, \boxed{{{}}}",
    r"\boxed{{{} \text{{ or }} {}}}",
    r"\boxed{{{} = {}}}",
    r"\boxed{{x = {} = {}}}",
    r"\boxed{{{}; {}}}",
    r"\boxed{{{}\;{}}}",
    r"\boxed{{{} \ne {}}}",
    r"\boxed{{{} \pm {}}}",
    r"\boxed{{{}\text{{ apples, not }}{}}}",
    "${}$ ${}$",
    "The answer is ${}$ or ${}$.",
    "Answer: {} {}",
    "It is {}, maybe {}",
    "#### {} or {}",
    "<answer>{}, {}</answer>",
]


@pytest.mark.parametrize("hedge", HEDGES)
def test_naming_two_answers_earns_neither(hedge: str) -> None:
    assert [verdict(hedge.format(5, 6), str(number)) for number in range(12)] == [0.0] * 12


@pytest.mark.parametrize("solution", [None, "", "   ", "**", {}, {"style": "rule"}])
def test_without_a_reference_it_abstains(solution: object) -> None:
    assert verdict("5", solution) is None


def test_all_boxes_of_a_reference_count_however_far_apart() -> None:
    reference = r"One root is \boxed{4}." + " We divide by the factor." * 20 + r" The other is \boxed{6}."
    assert [verdict(rf"\boxed{{{answer}}}", reference) for answer in ("4, 6", "6, 4", "6", "4")] == [1.0, 1.0, 0.0, 0.0]


def test_only_a_stated_answer_counts_when_asked() -> None:
    assert verdict("we find 5", "5") == 1.0
    assert verdict("we find 5", "5", explicit=True) == 0.0
    assert verdict("#### 5", "5", explicit=True) == 1.0


BOMBS = [
    "9**9**9",
    "9^9^9^9",
    r"\boxed{9^{9^{9}}}",
    "The answer is $(10^8)!$",
    "#### (10^8)!",
    "(" * 3000 + "1" + ")" * 3000,
    r"\boxed{\frac{1}{9^{9^9}}}",
    r"\sqrt{9^{9^9}}",
    r"\boxed{\sqrt{9^{9^9}}}",
    r"\binom{10^9}{10^8}",
    r"\boxed{\binom{10^9}{10^8}}",
    r"\boxed{10^{-10^{10}}}",
    r"\boxed{2^{2^{2^{2^{0.5}}}}^{9^9}}",
    "100!!!",
    r"\boxed{100!!!}",
    "9" * 5000,
    r"\boxed{1e999999999}",
    "1+" * 190 + "1",
    r"\boxed{" + "-" * 300 + "5}",
    r"\boxed{x^{x^{x^{100}}}}",
    r"\boxed{9^{9^9} + \sum_{k=1}^{2} k}",
    r"\boxed{\lim_{x \to 0} (10^8)!}",
    r"\boxed{" * 20000,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_number_too_large_to_write_down_is_wrong_at_once(bomb: str) -> None:
    assert verdict(bomb, "5", timeout_s=10) == 0.0


PHRASES = [
    "the answer is ",
    "the answer is not 5, but ",
    "the answer is 5\n",
    "answer ",
    "#### ",
    "#### 5",
    r"\boxed{",
    r"\boxed{4}",
    "<think>",
    "</think>",
    "<answer>",
    r"\[",
    r"\( ",
    "$a",
    "$$",
    "<<1 ",
    " A: ",
    "5 or ",
    "1,",
    r"\begin{align}",
    r"\text{",
    "x=",
    "(",
    "\n",
    " ",
    "*",
]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_300_000_characters_of_one_phrase_are_judged_in_linear_time() -> None:
    """What is quadratic in its length would take minutes."""
    texts = [phrase * (300_000 // len(phrase)) for phrase in PHRASES]
    assert sum(verdict(text, "7") or 0.0 for text in texts) == 0.0


def test_a_large_number_that_can_be_written_down_is_compared() -> None:
    assert verdict("2^{100}", "1267650600228229401496703205376") == 1.0
    assert verdict("10!", "3628800") == 1.0


def test_no_verdict_in_time_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object, **options: object) -> bool:
        assert options["timeout_seconds"] == 1
        raise TimeoutException

    monkeypatch.setattr("rlflow.rewards.mathematics.symbolic.verify", late)
    with pytest.raises(TimeoutError, match="took over 1 s"):
        verdict(r"\boxed{\sum_{k=1}^{9} k^k}", "5", timeout_s=1)


def test_off_the_main_thread_what_needs_math_verify_raises_instead_of_scoring_zero() -> None:
    caught: list[BaseException] = []

    def score() -> None:
        try:
            verdict(r"\boxed{\sum_{k=1}^{4} k}", "10")
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert "threaded environment" in str(caught[0])


def test_cosine_judges_as_math_accuracy_does() -> None:
    completions = [r"\boxed{4uw}", r"\boxed{4 1/3}", r"\boxed{0.5}"]
    options = {"correct_short": 1, "correct_long": 1, "wrong_short": 0, "wrong_long": 0, "max_tokens": 9}
    rewards = cosine([None] * 3, completions, [[]] * 3, ["4uv", "13/3", {"ground_truth": "50%"}], **options)
    assert rewards == [0.0, 1.0, 1.0]
