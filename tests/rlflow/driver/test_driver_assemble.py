"""Scored groups to samples: which tokens are trained, with which advantage and weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlflow.algorithms.kl_reward import kl_of_sequences
from rlflow.algorithms.weighing import weigh
from rlflow.driver import assemble
from rlflow.recipe import algorithm_of
from rlflow.types import FinishReason, Group, Prompt, Rollout
from tests.flat_rollouts import flat

PROMPT = np.array([10, 11, 12], dtype=np.int32)
EOS = 1


def rollout(tokens: list[int], reward: float, finish_reason: FinishReason = "stop") -> Rollout:
    return flat(PROMPT, tokens, reward, finish_reason=finish_reason)


def group(*rollouts: Rollout) -> Group:
    return Group(Prompt("p", PROMPT, [], {}), 0, rollouts)


def weights_of(samples) -> list[list[float]]:
    return [sample.loss_weights.tolist() for sample in samples]


def test_the_stop_token_the_policy_wrote_is_trained_and_nothing_of_the_prompt_is():
    batch = assemble.assemble([group(rollout([20, 21, EOS], 1.0), rollout([EOS], 0.0))], algorithm_of("grpo"), 8)
    assert [sample.token_ids.tolist() for sample in batch.samples] == [[10, 11, 12, 20, 21, EOS], [10, 11, 12, EOS]]
    assert [sample.loss_mask.tolist() for sample in batch.samples] == [[False] * 3 + [True] * 3, [False] * 3 + [True]]
    old = [s.old_logprobs.tolist() for s in batch.samples if s.old_logprobs is not None]
    assert old == [[0, 0, 0, -1, -2, -3], [0, 0, 0, -1]]


@pytest.mark.parametrize(("masked", "state"), [(True, "masked"), (False, "trained")])
@pytest.mark.parametrize("reason", ["length", "abort"])
def test_a_truncated_completion_is_trained_unless_the_recipe_filters_it(masked, state, reason):
    block = algorithm_of("dapo", groups={"mask_truncated": masked})
    batch = assemble.assemble([group(rollout([20, 21], 1.0, reason), rollout([EOS], 0.0))], block, 2)
    assert batch.states == [state, "trained"]


def test_an_unscored_rollout_is_masked_and_leaves_the_baseline_alone():
    rollouts = [rollout([20, EOS], float("nan")), rollout([21, EOS], 1.0), rollout([EOS], 0.0)]
    block = algorithm_of("grpo", advantage={"scale": "none"})
    batch = assemble.assemble([group(*rollouts)], block, 8)
    samples = assemble.with_advantages(batch, batch.samples, block)
    assert batch.states == ["masked", "trained", "trained"]
    advantages = [s.advantages.tolist() for s in samples if s.advantages is not None]
    assert advantages == [[0, 0, 0, 0, 0], [0, 0, 0, 0.5, 0.5], [0, 0, 0, -0.5]]


def test_soft_overlong_punishment_is_added_to_the_reward():
    # Of 10 tokens the last 4 are the buffer: 8 tokens are 2 into it, half of the punishment of 1.
    block = algorithm_of("dapo", groups={"overlong_buffer": 0.4})
    batch = assemble.assemble([group(rollout([20] * 8, 1.0), rollout([20] * 6, 1.0))], block, 10)
    assert batch.rewards.tolist() == [0.5, 1.0]


def test_masked_completions_count_in_the_weights_only_when_the_recipe_says_so():
    block = algorithm_of("dapo", groups={"mask_truncated": True})
    batch = assemble.assemble([group(rollout([20, 21, 22], 1.0, "length"), rollout([EOS], 0.0))], block, 3)
    samples, denominators = weigh(batch.samples, block, 3)
    assert denominators.num_tokens == 1
    assert weights_of(samples) == [[0] * 6, [0, 0, 0, 1.0]]
    samples, denominators = weigh(batch.samples, block, 3, counts=batch.num_sampled_tokens)
    assert weights_of(samples) == [[0] * 6, [0, 0, 0, 0.25]]
    assert denominators.num_tokens == 1, "metrics are means over what is trained"


def test_the_kl_in_the_reward_is_that_of_each_token():
    """reinforce++: A_t = r - coef * sum of (old - ref) from t on; whitening off."""
    block = algorithm_of("reinforce++", advantage={"whiten": False}, kl={"coef": 0.1})
    batch = assemble.assemble([group(rollout([20, EOS], 1.0))], block, 8)
    reference = np.array([0, 0, 0, -2.0, -1.0], dtype=np.float32)
    samples = [replace(batch.samples[0], ref_logprobs=reference)]
    # old is -1, -2: penalties 0.1 * (1, -1).
    (sample,) = assemble.with_advantages(batch, samples, block)
    assert sample.advantages is not None
    assert sample.advantages.tolist() == pytest.approx([0, 0, 0, 1.0, 1.1])


def test_a_critics_values_make_advantages_and_returns():
    """gae with gamma = lambda = 1: the return is what follows, the advantage what the value did not expect."""
    block = algorithm_of("ppo", advantage={"whiten": False, "gae_lambda": 1.0}, kl={"coef": 0.0})
    batch = assemble.assemble([group(rollout([20, 21, EOS], 1.0))], block, 8)
    values = np.array([0, 0, 0, 0.25, 0.5, 0.75], dtype=np.float32)
    (sample,) = assemble.with_advantages(batch, [replace(batch.samples[0], old_values=values)], block)
    assert sample.advantages is not None and sample.returns is not None
    assert sample.advantages.tolist() == [0, 0, 0, 0.75, 0.5, 0.25]
    assert sample.returns.tolist() == [0, 0, 0, 1.0, 1.0, 1.0]


def test_the_kl_of_a_sequence_is_summed_over_its_trained_tokens():
    batch = assemble.assemble([group(rollout([20, EOS], 1.0), rollout([EOS], float("nan")))], algorithm_of("grpo"), 8)
    samples = [replace(s, ref_logprobs=np.full(len(s.token_ids), -3.0, np.float32)) for s in batch.samples]
    assert kl_of_sequences(samples) == pytest.approx((-1 + 3) + (-2 + 3))


@pytest.mark.parametrize(("ddof", "expected"), [(0, 1.0), (1, 0.5**0.5)])
def test_rewards_are_normalised_over_the_batch_with_the_recipes_ddof(ddof, expected):
    # 1 and 3: deviations of 1; variance 1 with ddof 0, 2 with ddof 1.
    block = algorithm_of("grpo", groups={"reward_scaling": "normalize_sum"}, advantage={"ddof": ddof, "eps": 1e-9})
    batch = assemble.assemble([group(rollout([EOS], 1.0), rollout([EOS], 3.0))], block, 8)
    np.testing.assert_allclose(batch.rewards, [-expected, expected], rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.2, 0.3, 0.7, 1.1, 1 / 3, -0.1, 1.0])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 12])
def test_groups_whose_rewards_are_all_the_same_number_teach_nothing(value, size):
    same, lone = group(*[rollout([EOS], value)] * size), group(rollout([EOS], value), rollout([EOS], float("nan")))
    unscored = group(*[rollout([EOS], float("nan"))] * 2)
    unlike = group(rollout([EOS], value), rollout([EOS], value + 0.01))
    batch = assemble.Batch([same, lone, unscored, unlike], np.zeros((4, 2)), [])
    assert assemble.rollout_metrics(batch, 0)["group/zero_std_fraction"] == 0.75
