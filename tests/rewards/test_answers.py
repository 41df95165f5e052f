"""Where texts state their answers."""

from __future__ import annotations

import pytest

from rlflow.rewards.answers import final_answer, last_boxed, reference_answer


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
        ("first\nlast 7\nno digits", "7"),
        ("only words", "only words"),
        ("#### Step 1\nThe answer is 42.\n#### 2. Check\n21 + 21", "42"),
        ("#### Step 1\n#### **42**", "42"),
        ("#### Final answer\n\n42", "42"),
        ("#### x + 1", "x + 1"),
        (r"#### \frac{1}{2}", r"\frac{1}{2}"),
        ("\n \n", None),
        ("<answer>1</answer><answer>$2$</answer>", "2"),
        (r"We get 44, so $17^{-1} \equiv \boxed{44}$. A check shows that our answer is correct.", "44"),
        (r"\boxed{2} and $y = \boxed{3}$", "2, 3"),
        (r"\boxed{2}, so \boxed{3}", "3"),
        ("\\boxed{2}\n\n\\boxed{3}", "3"),
        (r"\boxed{2} " + "x" * 80 + r" and \boxed{3}", "3"),
        (r"\boxed{2}, that is \boxed{2}", "2"),
        ("The answer is\n\\[\nx = 14\n\\]", "x = 14"),
        ("Hence\n$$\n14\n$$", "14"),
        ("Hence\n\\begin{align*}\nx &= 3 + 4 \\\\\n&= 7\n\\end{align*}", "7"),
        ("It costs $5 and $6, so $11 in all.", "$11"),
        ("The roots are $2$ and $3$.", "2 and 3"),
        ("The point is (3, 4).", "(3, 4)"),
        ("16 - 3 - 4 = 9, 9 * 2 = 18", "18"),
        ("There is nothing but 3 or 4", "3 or 4"),
        ("It is at least 5", None),
        ("The answer is not 5.", None),
        ("The answer is not 5 but 6.", "6"),
        ("The answer isn't 5, it is 6.", "6"),
        ("The answer is 5, and he has 3 more.", "5"),
        ("The answer is that she has 5 apples.", "5 apples"),
        ("Q: 1+1? A: 2", "2"),
        ("thus 4.\n> 5", "5"),
    ],
)
def test_the_final_answer_is_what_the_text_states_last(text: str, answer: str | None) -> None:
    found = final_answer(text)
    assert (found and " ".join(found.split())) == answer


@pytest.mark.parametrize("tag", ["<think>", "<thinking>", "[THINK]", "<seed:think>"])
def test_a_thought_that_is_not_closed_leaves_no_answer(tag: str) -> None:
    closed = tag.replace("<", "</").replace("[", "[/")
    assert final_answer(f"{tag}The answer is 5.") is None
    assert final_answer(f"{tag}a{closed} The answer is 5. {tag} or 6") is None
    assert final_answer(f"{tag}The answer is 5.{closed} The answer is 6.") == "6"
    assert final_answer(f"The answer is 5.{closed} The answer is 6.") == "6"


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("8 and 15", "8 and 15"),
        ("June 8", "June 8"),
        (r"\boxed{4}, so \boxed{6}", "4, 6"),
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("She makes 9 * 2 = $<<9*2=18>>18.\nA: 18", "18"),
        ("First 3.\nThen 4.", "4"),
        ("", None),
    ],
)
def test_a_reference_is_its_box_or_marker_or_the_whole_line(reference: str, answer: str | None) -> None:
    assert reference_answer(reference) == answer
