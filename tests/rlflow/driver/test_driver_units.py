"""What an offline step draws: KTO's mismatched pairs above all."""

from __future__ import annotations

import numpy as np
import pytest

from rlflow.algorithms.batch_targets import with_targets
from rlflow.data.errors import DataError
from rlflow.data.examples import Example
from rlflow.data.preferences import Labelled
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.driver.units import answer_units, judged_units, load_units
from rlflow.recipe import Recipe, algorithm_of
from rlflow.types import Sample


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


def test_an_answer_that_is_compared_with_no_other_is_a_unit_alone():
    units = answer_units([judged([1], [10, 11]), judged([2], [20], False)], 64)
    assert [[one.token_ids.tolist() for one in unit] for unit in units] == [[[1, 10, 11]], [[2, 20]]]
    assert [unit[0].label for unit in units] == [1.0, -1.0]


def answer(logprob: float, reference: float, length: int, label: float) -> tuple[Sample, float]:
    """A prompt of one token and an answer whose tokens all have these logprobs."""
    size = 1 + length
    mask = np.arange(size) >= 1
    scored = np.where(mask, reference, 0.0).astype(np.float32)
    sample = Sample(np.zeros(size, np.int32), mask, np.zeros(size, np.float32), ref_logprobs=scored, label=label)
    return sample, logprob


# Two pairs: logprobs of a token by policy and reference, tokens, chosen then rejected.
PAIRS = [
    [answer(-1.0, -2.0, 2, 1.0), answer(-3.0, -1.0, 4, -1.0)],
    [answer(-2.0, -0.5, 4, 1.0), answer(-1.0, -4.0, 1, -1.0)],
]


@pytest.mark.parametrize(
    ("loss", "normalized", "expected"),
    [
        # Log-ratios of policy: -2 + 12 = 10 and -8 + 1 = -7; of reference: -4 + 4 = 0 and -2 + 4 = 2. By rank the lower
        # goes with the lower: -7 with 0 and 10 with 2, and the margins are what these exceed the pairs' own by.
        ("aot", False, [2.0, 2.0, -2.0, -2.0]),
        # Of means: -1 + 3 = 2 and -2 + 1 = -1; of reference -2 + 1 = -1 and -0.5 + 4 = 3.5: -1 with -1, 2 with 3.5.
        ("aot", True, [4.5, 4.5, -4.5, -4.5]),
        # Scores of the chosen: -2 + 4 = 2 and -8 + 2 = -6; of the rejected: -12 + 4 = -8 and -1 + 4 = 3. Each is
        # compared with the other side's of its rank: 2 with 3, -6 with -8.
        ("aot_unpaired", False, [3.0, -6.0, -8.0, 2.0]),
        # Of means: 1 and -1.5; -2 and 3: 1 with 3, -1.5 with -2.
        ("aot_unpaired", True, [3.0, -1.5, -2.0, 1.0]),
    ],
)
def test_aots_margins_are_of_sums_or_of_means_on_both_sides(loss, normalized, expected):
    units = [(chosen[0], rejected[0]) for chosen, rejected in PAIRS]
    policy = [np.full(len(sample.token_ids), logprob) for pair in PAIRS for sample, logprob in pair]
    block = algorithm_of("dpo", preference={"loss": loss, "length_normalized": normalized, "beta": 0.1})
    samples = with_targets(units, block, lambda samples: policy)
    field = {"aot": "rank_margin", "aot_unpaired": "rank_partner"}[loss]
    assert [getattr(sample, field) for sample in samples] == pytest.approx(expected)


def test_margins_of_the_data_reach_a_reward_model_and_no_other_loss(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}\n')
    given = {"model": {"architecture": {"model_type": "llama"}, "characters": "abc"}, "run": {"steps": 1}}
    recipes = {
        name: Recipe.model_validate({"algorithm": {"name": name}, "data": {"train": {"path": str(rows)}}, **given})
        for name in ("reward_model", "dpo")
    }
    tokenizer = build_character_tokenizer("abc")
    ((chosen, rejected),) = load_units(recipes["reward_model"], recipes["reward_model"].data, tokenizer)
    assert (chosen.reward_margin, rejected.reward_margin) == (0.5, 0.5)
    with pytest.raises(DataError, match="a column `margin`, which only the loss of a reward_model looks at"):
        load_units(recipes["dpo"], recipes["dpo"].data, tokenizer)
