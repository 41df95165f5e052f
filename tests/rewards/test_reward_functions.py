"""Golden values, worked out by hand from the published formulas, and TRL's own functions as live oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlflow.rewards.cosine import cosine
from rlflow.rewards.exact_match import exact_match
from rlflow.rewards.formats import answer_format, boxed_format, pattern_format, react_format
from rlflow.rewards.last_number import last_number
from rlflow.rewards.lengths import repetition, soft_overlong


def score(function: Any, *texts: str, ids: list[list[int]] | None = None, **options: Any) -> list[float | None]:
    return function([None] * len(texts), list(texts), ids or [[]] * len(texts), **options)


def score_lengths(function: Any, *lengths: int, **options: Any) -> list[float | None]:
    return score(function, *[""] * len(lengths), ids=[[1] * length for length in lengths], **options)


def test_last_number_reads_the_last_number_of_both_sides_and_is_not_earned_by_repeating_the_problem() -> None:
    texts = ["The answer is 12.", "5 + 7", "-12", "so 1,200.50 it is", "twelve", "12"]
    solutions = [12, "12", "12", "#### 1200.5", "12", "none"]
    assert score(last_number, *texts, solution=solutions) == [1.0, 0.0, 0.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".5", "0.5"),
        ("9-5", "5"),
        ("9 - 5", "5"),
        ("9, -5", "-5"),
        ("x=-5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("2e5", "200000"),
        ("2.5E-3", "0.0025"),
        ("(1,2)", "2"),
        ("1,2,3", "3"),
        ("(1,234)", "1234"),
        ("3/4", "0.75"),
        ("12:30", "30"),
        ("5%", "5"),
        ("5.", "5"),
    ],
)
def test_last_number_reads_one_whole_number(text: str, number: str) -> None:
    others = [other for other in ("5", "-5", "2", "12", "0.05", "25", "4", "1", "1230", "123") if other != number]
    rewards = score(last_number, *[text] * (1 + len(others)), solution=[number, *others])
    assert rewards == [1.0] + [0.0] * len(others)


def test_last_number_takes_verls_references_and_judges_numbers_of_any_length_exactly() -> None:
    references = [{"style": "rule", "ground_truth": "#### 7"}, ["7"], 7.0, 1e17, "9" * 40, "9" * 5000]
    texts = ["7", "7", "7", "100000000000000000", "9" * 39 + "8", "9" * 5000]
    assert score(last_number, *texts, solution=references) == [1.0, 1.0, 1.0, 1.0, 0.0, None]


def test_exact_match_ignores_surrounding_space_only() -> None:
    assert score(exact_match, " 42\n", "4 2", "42.0", "x", solution=["42", "42", 42, None]) == [1.0, 0.0, 0.0, None]


def test_exact_match_takes_a_number_in_the_ways_it_is_written() -> None:
    texts = ["7", "7.0", "7.00", "0.00002", "2e-05", "100000000000000000", "7", "nan", "7", "7"]
    references = [7.0, 7.0, 7.0, 2e-05, 2e-05, 1e17, "7.0", float("nan"), {"ground_truth": "7"}, ["7"]]
    assert score(exact_match, *texts, solution=references) == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_format_wants_thought_and_answer_and_nothing_else() -> None:
    good = "<think>a\nb</think>\n<answer>c</answer>"
    texts = [good, good + "\n", "x" + good, "<think>a</think>c", "<think>a<answer>c</answer>", ""]
    assert score(pattern_format, *texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_format_takes_another_pattern() -> None:
    assert score(pattern_format, "12", "12a", "1\n2", pattern=r"\d.?\d") == [1.0, 0.0, 1.0]


def test_react_format_wants_a_thought_and_a_tool_call() -> None:
    call = "<think>a</think>\nAction: search\nAction Input: {}"
    assert score(react_format, call, call.replace("Input", ""), "Action: a Action Input: b") == [1.0, 0.0, 0.0]


def test_answer_format_wants_one_number_after_hashes_at_the_end() -> None:
    texts = ["x\n#### 42", "#### -1,234.5\n", "#### $3/4", "#### 42 apples", "#### 1\n#### 2", "42", "####"]
    assert score(answer_format, *texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_boxed_format_wants_one_closed_box_with_something_in_it() -> None:
    texts = [r"so \boxed{\frac{1}{2}}.", r"\boxed{1", r"\boxed{ }", r"\boxed{1} \boxed{2}", "1"]
    assert score(boxed_format, *texts) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_soft_overlong_is_dapo_equation_13() -> None:
    """L_max 100, L_cache 20: 0 up to 80, (80 - 90) / 20 at 90, -1 at 100 and beyond."""
    rewards = score_lengths(soft_overlong, 0, 80, 81, 90, 100, 101, 500, max_tokens=100, cache_tokens=20)
    assert rewards == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    assert score_lengths(soft_overlong, 100, 101, max_tokens=100, cache_tokens=0) == [0.0, -1.0]


def test_soft_overlong_refuses_a_slope_longer_than_the_limit() -> None:
    with pytest.raises(ValueError, match="cache_tokens 20"):
        score_lengths(soft_overlong, 1, max_tokens=10, cache_tokens=20)


def test_repetition_counts_words() -> None:
    """'a b a b a b' has the trigrams aba bab aba bab: 2 of 4 unique. The last text has 2 words, under n."""
    assert score(repetition, "a b A b a B", "a b c d", "a a", "") == [-0.5, 0.0, 0.0, 0.0]
    assert score(repetition, "a a a a a", ngram_size=2, max_penalty=-2.0) == [-1.5]


def test_repetition_counts_tokens_when_asked() -> None:
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]]
    assert score(repetition, "x x x x x", "y", "z", ids=ids, unit="tokens", ngram_size=2) == [0.0, -0.75, 0.0]


def test_repetition_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="max_penalty 1 at most 0"):
        score(repetition, "a", max_penalty=1)
    with pytest.raises(ValueError, match="unit 'letters'"):
        score(repetition, "a", unit="letters")


def cosine_of(length: int, text: str = "5", **options: Any) -> float | None:
    options.setdefault("max_tokens", 100)
    return cosine([None], [text], [[1] * length], ["5"], **options)[0]


def test_cosine_falls_with_length_when_right_and_rises_when_wrong() -> None:
    """cos(0) = 1, cos(pi/2) = 0, cos(pi/3) = 1/2, cos(pi) = -1."""
    assert [cosine_of(length) for length in (0, 50, 100)] == pytest.approx([1.0, 0.75, 0.5])
    assert [cosine_of(length, "6") for length in (0, 50, 100)] == pytest.approx([-1.0, -0.75, -0.5])
    assert cosine_of(1, max_tokens=3) == pytest.approx(0.5 + 0.5 * 0.75)


def test_cosine_past_the_limit_is_clamped_as_in_trl_or_not_as_in_ms_swift() -> None:
    assert cosine_of(200) == pytest.approx(0.5)
    assert cosine_of(200, clamp=False) == pytest.approx(1.0)


def test_cosine_has_the_papers_value_for_what_is_too_long() -> None:
    paper: dict[str, Any] = {
        "correct_short": 2,
        "correct_long": 1,
        "wrong_short": -10,
        "wrong_long": 0,
        "exceeded": -10,
    }
    assert [cosine_of(length, "5", **paper) for length in (0, 50, 100, 101)] == pytest.approx([2.0, 1.5, -10.0, -10.0])
    assert cosine_of(50, "6", **paper) == pytest.approx(-5.0)


def test_cosine_abstains_where_accuracy_does() -> None:
    assert cosine([None], ["5"], [[1]], [None], max_tokens=10) == [None]


def test_trl_agrees() -> None:
    trl = pytest.importorskip("trl.rewards")
    ids = [[(7 * i * i) % 11 for i in range(length)] for length in (0, 1, 5, 60, 85, 100, 130)]
    texts = [r"\boxed{5}" if length % 2 else r"\boxed{6}" for length in range(len(ids))]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    ours = score(repetition, *texts, ids=ids, unit="tokens", ngram_size=2)
    assert ours == pytest.approx(trl.get_repetition_penalty_reward(ngram_size=2)(completion_ids=ids))
    ours = score(soft_overlong, *texts, ids=ids, max_tokens=100, cache_tokens=20)
    assert ours == pytest.approx(trl.get_soft_overlong_punishment(100, 20)(completion_ids=ids))
    ours = score(cosine, *texts, ids=ids, solution=["$5$"] * len(ids), max_tokens=100)
    theirs = trl.get_cosine_scaled_reward(100)(completions=messages, solution=["$5$"] * len(ids), completion_ids=ids)
    assert ours == pytest.approx(theirs)
    assert all(isinstance(value, float) and math.isfinite(value) for value in ours)
