"""What an offline step draws: KTO's mismatched pairs above all."""

from __future__ import annotations

import numpy as np

from rlflow.data.examples import Example
from rlflow.data.preferences import Labelled
from rlflow.driver.units import judged_units


def judged(prompt: list[int], answer: list[int], label: bool = True) -> Labelled:
    tokens = np.array(prompt + answer, dtype=np.int32)
    return Labelled(f"row {tokens}", Example("row", tokens, np.arange(len(tokens)) >= len(prompt)), label)


def test_a_mismatched_pair_is_the_prompt_with_the_answer_half_the_data_away():
    rows = [judged([1], [10, 11]), judged([2, 2], [20]), judged([3], [30]), judged([4], [40])]
    answer, mismatched = judged_units(rows, 64)[0]
    assert answer.token_ids.tolist() == [1, 10, 11] and answer.label == 1.0
    assert mismatched.token_ids.tolist() == [1, 30]
    assert mismatched.loss_mask.tolist() == [False, True] and mismatched.label == 0.0


def test_an_answer_to_the_same_prompt_is_no_mismatch():
    rows = [judged([1], [10]), judged([1], [11]), judged([1], [12], False), judged([5], [50])]
    units = judged_units(rows, 64)
    assert [mismatched.token_ids.tolist() for _, mismatched in units[:3]] == [[1, 50]] * 3
    assert units[2][0].label == -1.0


def test_when_all_prompts_are_the_same_another_answer_must_do():
    rows = [judged([1], [10]), judged([1], [11], False)]
    assert judged_units(rows, 64)[0][1].token_ids.tolist() == [1, 11]


def test_a_mismatched_pair_is_cut_to_the_longest_sequence():
    rows = [judged([1, 1, 1], [10]), judged([2], [20, 21, 22])]
    mismatched = judged_units(rows, 4)[0][1]
    assert mismatched.token_ids.tolist() == [1, 1, 1, 20]
    assert mismatched.loss_mask.tolist() == [False, False, False, True]
