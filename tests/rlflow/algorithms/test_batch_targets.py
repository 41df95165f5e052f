"""What a batch is made into before its update, by hand: KTO's KL, groups, and whose tokens are weighed."""

from __future__ import annotations

import numpy as np
import pytest

from rlflow.algorithms.batch_targets import with_targets
from rlflow.algorithms.weighing import weigh
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators, Sample


def sample(length: int, label: float = 0.0, reference: float | None = None, group: int = 0) -> Sample:
    """A prompt of one token, then ``length`` that are trained, each of this logprob under the reference."""
    mask = np.arange(1 + length) >= 1
    scored = None if reference is None else np.where(mask, reference, np.nan).astype(np.float32)
    tokens, weights = np.zeros(1 + length, np.int32), np.zeros(1 + length, np.float32)
    return Sample(tokens, mask, weights, ref_logprobs=scored, label=label, group=group)


def weights_of(samples: list[Sample]) -> list[float]:
    """That of each sample's last token; its other loss tokens have the same, and what is not trained none."""
    for one in samples:
        assert (one.loss_weights == np.where(one.loss_mask, one.loss_weights[-1], 0)).all()
    return [float(one.loss_weights[-1]) for one in samples]


def test_ktos_kl_is_the_mean_log_ratio_of_the_mismatched_answers_and_these_are_not_trained():
    units = [
        (sample(3, 1.0, -9.0), sample(2, reference=-2.0)),
        (sample(1, -1.0, -9.0), sample(4, reference=-1.0)),
        # An answer that was cut away whole says nothing of the KL.
        (sample(2, 1.0, -9.0), sample(0, reference=-1.0)),
    ]
    asked: list[Sample] = []

    def logprobs_of(samples):
        asked.extend(samples)
        return [np.full(len(one.token_ids), -0.5, np.float32) for one in samples]

    answers = with_targets(units, algorithm_of("kto"), logprobs_of)
    # 2 (-0.5 + 2) = 3 and 4 (-0.5 + 1) = 2.
    assert [one.batch_kl for one in answers] == [2.5] * 3
    assert [one.label for one in answers] == [1.0, -1.0, 1.0]
    assert [len(one.token_ids) for one in asked] == [3, 5]


def test_ktos_kl_is_0_where_nothing_is_left_to_measure_it_on():
    units = [(sample(3, 1.0, -9.0), sample(0, reference=-2.0))]
    assert with_targets(units, algorithm_of("kto"), lambda samples: [])[0].batch_kl == 0.0


def test_answers_that_are_compared_with_no_kl_ask_for_no_forward_pass():
    units = [(sample(3, 1.0, -9.0),), (sample(1, -1.0, -9.0),)]
    answers = with_targets(units, algorithm_of("apo_zero_unpaired"), lambda samples: pytest.fail("asked"))
    assert [(one.batch_kl, one.label) for one in answers] == [(0.0, 1.0), (0.0, -1.0)]


@pytest.mark.parametrize(("name", "groups"), [("sft", [0, 1]), ("dpo", [0, 0, 1, 1]), ("reward_model", [0, 0, 1, 1])])
def test_a_sample_names_its_row_and_losses_on_single_rows_ask_for_no_forward_pass(name: str, groups: list[int]):
    units = [tuple(sample(2) for _ in range(len(groups) // 2)) for _ in range(2)]
    assert [
        one.group for one in with_targets(units, algorithm_of(name), lambda samples: pytest.fail("asked"))
    ] == groups


def test_samples_are_weighed_in_their_groups_of_any_size():
    # Prompts of 1 + 2 and of 3 tokens: 1 / (2 prompts x their tokens).
    samples = [sample(1), sample(2), sample(3, group=1)]
    block = algorithm_of("grpo", loss={"reduction": "prompt"})
    weighed, denominators = weigh(samples, block, 8)
    assert weights_of(weighed) == pytest.approx([1 / 6, 1 / 6, 1 / 6])
    assert denominators == Denominators(6, 3, 2)
    weighed, _ = weigh([sample(1), sample(2), sample(5, group=1)], block, 8)
    assert weights_of(weighed) == pytest.approx([1 / 6, 1 / 6, 1 / 10])


def test_of_pairs_the_chosen_answers_alone_are_weighed_and_all_tokens_are_counted():
    samples = [sample(1, 1.0), sample(4, -1.0), sample(3, 1.0), sample(2, -1.0)]
    weighed, denominators = weigh(samples, algorithm_of("cpo"), 8)
    assert weights_of(weighed) == pytest.approx([1 / 4, 0, 1 / 4, 0])
    assert denominators == Denominators(10, 4, 2)
