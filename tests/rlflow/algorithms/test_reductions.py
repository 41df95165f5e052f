import numpy as np
import pytest

from rlflow.algorithms.reductions import REDUCTIONS, count_denominators, loss_weights, preference_weights
from rlflow.types import Denominators

# Two prompts of two completions; one completion is left out of the loss.
COUNTS = np.array([2, 4, 0, 6])
GROUPS = np.array([0, 0, 1, 1])


def weigh(reduction, counts=COUNTS, groups=GROUPS, max_new_tokens=10):
    return loss_weights(reduction, counts, groups, count_denominators(counts, groups), max_new_tokens)


def test_denominators_count_what_has_loss_tokens():
    assert count_denominators(COUNTS, GROUPS) == Denominators(num_tokens=12, num_sequences=3, num_groups=2)
    assert count_denominators(np.array([0, 0, 3]), np.array([0, 0, 1])) == Denominators(3, 1, 1)


def test_token_mean_gives_every_token_the_same_weight():
    np.testing.assert_allclose(weigh("token"), [1 / 12, 1 / 12, 0, 1 / 12])


def test_sequence_mean_gives_every_sequence_the_same_weight():
    np.testing.assert_allclose(weigh("sequence"), [1 / (2 * 3), 1 / (4 * 3), 0, 1 / (6 * 3)])


def test_prompt_mean_gives_every_prompt_the_same_weight():
    np.testing.assert_allclose(weigh("prompt"), [1 / (6 * 2), 1 / (6 * 2), 0, 1 / (6 * 2)])
    np.testing.assert_allclose(weigh("prompt", np.array([1, 2, 3, 2])), [1 / 6, 1 / 6, 1 / 10, 1 / 10])


def test_fixed_length_divides_by_what_could_have_been_written():
    np.testing.assert_allclose(weigh("fixed_length"), [1 / 30, 1 / 30, 0, 1 / 30])


@pytest.mark.parametrize("reduction", ["token", "sequence", "prompt"])
def test_a_mean_of_ones_is_one(reduction):
    assert (weigh(reduction) * COUNTS).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_loss_tokens_has_no_weight_and_no_division_by_zero(reduction):
    np.testing.assert_array_equal(weigh(reduction, np.zeros(4, dtype=int)), 0.0)


def test_left_out_completions_count_only_when_their_tokens_are_given():
    # The left-out completion would have had 8 tokens; count_masked passes them, and what is trained is weighed.
    counted = np.array([2, 4, 8, 6])
    np.testing.assert_allclose(weigh("token", counted), np.full(4, 1 / 20))
    np.testing.assert_allclose(weigh("sequence", counted)[[0, 1, 3]], [1 / 8, 1 / 16, 1 / 24])


def test_only_chosen_answers_have_likelihood_weights_and_pairs_are_counted():
    weights, denominators = preference_weights("token", np.array([2, 5, 6, 1]), np.array([1.0, -1.0, 1.0, -1.0]), 10)
    np.testing.assert_allclose(weights, [1 / 8, 0, 1 / 8, 0])
    assert denominators == Denominators(num_tokens=14, num_sequences=4, num_groups=2)
