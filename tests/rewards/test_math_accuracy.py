"""Verdicts on answers as models write them, on published answers, and on answers made to stall a verifier."""

from __future__ import annotations

import threading

import pytest

from rlflow.rewards.answers import final_answer, last_boxed
from rlflow.rewards.math_accuracy import math_accuracy


def verdict(completion: str, solution: object, **options: object) -> float | None:
    return math_accuracy([None], [completion], [[]], [solution], **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("1/3", r"\frac{1}{3}"),
        (r"\boxed{\frac13}", r"\frac{1}{3}"),
        (r"so $x = \dfrac{1}{3}$", "1/3"),
        ("That leaves 0.3333333", r"\frac{1}{3}"),
        ("16 - 3 - 4 = 9, 9 * 2 = 18\n#### 18", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18"),
        ("She has $<<9*2=18>>18\nA: 18", "#### 18"),
        ("The answer is $1,234.50.", "1234.5"),
        ("#### 1,450,000", "1450000"),
        ("#### 65960", "#### 65,960"),
        ("**Final answer:** $72$", "72"),
        ("The answer is:\n72", "72"),
        ("The answer is 72 dollars because 6 is wrong.", "72"),
        ("3 + 4 = 7", "7"),
        ("#### -10", "-10"),
        ("The answer is 42!", "42"),
        ("The answer is $5!$.", "120"),
        ("18.00", "18"),
        ("5 1/2", r"\frac{11}{2}"),
        ("2*sqrt(3)", r"2\sqrt{3}"),
        (r"\boxed{(3,pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{Evelyn}", r"\text{Evelyn}"),
        (r"\boxed{90}", r"90^\circ"),
        (r"\boxed{5 apples}", "5"),
        (r"\boxed{-2, 1}", "1,-2"),
        (r"\boxed{x=5}", "5"),
        ("<think>maybe 4</think> <answer>5</answer>", "5"),
        (r"We get 44, so $17^{-1} \equiv \boxed{44}$. A check shows that our answer is correct.", "44"),
        ("12", 12),
    ],
)
def test_an_equal_answer_scores_one(completion: str, solution: object) -> None:
    assert verdict(completion, solution) == 1.0


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("1/2", r"\frac{1}{3}"),
        (r"First \boxed{5}, no: \boxed{7}", "5"),
        ("The answer is 5. Wait, the answer is 6.", "5"),
        ("5 5 5 5 #### 4", "5"),
        ("(3, 4)", "4"),
        ("2 or 3", "3"),
        (r"\boxed{[1, 2]}", "(1, 2)"),
        ("", "5"),
        ("I do not know", "5"),
        (r"\boxed{5", "6"),
        ("<think>the answer is 5</think>", "5"),
    ],
)
def test_another_answer_scores_zero(completion: str, solution: object) -> None:
    assert verdict(completion, solution) == 0.0


@pytest.mark.parametrize("solution", [None, "", "   ", "**"])
def test_without_a_reference_it_abstains(solution: object) -> None:
    assert verdict("5", solution) is None


def test_only_a_stated_answer_counts_when_asked() -> None:
    assert verdict("we find 5", "5") == 1.0
    assert verdict("we find 5", "5", explicit=True) == 0.0
    assert verdict("#### 5", "5", explicit=True) == 1.0


@pytest.mark.parametrize(
    "bomb",
    [
        "9**9**9",
        "9^9^9^9",
        r"\boxed{9^{9^{9}}}",
        "The answer is $(10^8)!$",
        "#### (10^8)!",
        "(" * 3000 + "1" + ")" * 3000,
        r"\boxed{\frac{1}{9^{9^9}}}",
        r"\sqrt{9^{9^9}}",
        r"\binom{10^9}{10^8}",
        "10^{-10^{10}}",
        "100!!!",
        "9" * 5000,
        "1+" * 190 + "1",
        "x^{x^{x^{100}}}",
        r"\boxed{" * 20000,
    ],
    ids=lambda bomb: bomb[:20],
)
def test_a_number_too_large_to_write_down_is_wrong_at_once(bomb: str) -> None:
    assert verdict(bomb, "5", timeout_s=10) == 0.0


def test_a_large_number_that_can_be_written_down_is_compared() -> None:
    assert verdict("2^{100}", "1267650600228229401496703205376") == 1.0
    assert verdict("10!", "3628800") == 1.0


def test_no_verdict_in_time_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(TimeoutError, match="took over 1 s"):
        verdict(r"\boxed{\sum_{k=1}^{10^9} k^k}", "5", timeout_s=1)


def test_off_the_main_thread_it_raises_instead_of_scoring_zero() -> None:
    caught: list[BaseException] = []

    def score() -> None:
        try:
            verdict("0.5", "1/2 ")
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert "threaded environment" in str(caught[0])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{1} and \fbox{2}", "2"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{7}}", "7"),
    ],
)
def test_the_last_closed_box_is_found(text: str, answer: str) -> None:
    boxed = last_boxed(text)
    assert boxed is not None
    assert boxed.content == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x\n#### 42 \n", "42"),
        ("The answer is **42**.", "42"),
        ("Answer: 3.5 kg. Good.", "3.5 kg"),
        ("first\nlast 7\nno digits", "last 7"),
        ("only words", "only words"),
        ("#### Step 1\nThe answer is 42.\n#### 2. Check\n21 + 21", "42"),
        ("#### Step 1\n#### **42**", "42"),
        ("#### Final answer\n\n42", "42"),
        ("#### x + 1", "x + 1"),
        (r"#### \frac{1}{2}", r"\frac{1}{2}"),
        ("\n \n", None),
        ("<answer>1</answer><answer>$2$</answer>", "2"),
    ],
)
def test_the_final_answer_is_what_the_text_states_last(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer
