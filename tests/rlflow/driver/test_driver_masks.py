"""Loss masks with gaps, as between the turns of an episode: recursions and whitening see the loss tokens alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlflow.algorithms.kl_reward import kl_of_sequences
from rlflow.driver import assemble
from rlflow.recipe import AlgorithmBlock, algorithm_of
from rlflow.types import Group, Prompt, Sample
from tests.flat_rollouts import flat

NAN = float("nan")
PROMPT = np.array([10, 11], dtype=np.int32)
ANYWHERE_ELSE = np.float32(1e6)
"""What stands outside the mask: whatever reads it is wrong by a lot."""


def batch_of(rewards: list[list[float]], masks: list[list[int]], **fields: list[list[float]]) -> assemble.Batch:
    """Samples with these masks after the prompt, and these values of the loss tokens."""
    samples, rollouts = [], []
    for row, (reward, mask) in enumerate(zip(np.ravel(rewards), masks, strict=True)):
        loss_mask = np.array([0, 0, *mask], dtype=bool)
        placed = {}
        for name, values in fields.items():
            placed[name] = np.full(len(loss_mask), ANYWHERE_ELSE)
            placed[name][loss_mask] = values[row]
        tokens = np.arange(20, 20 + len(mask), dtype=np.int32)
        weights = np.zeros(len(loss_mask), dtype=np.float32)
        rollouts.append(flat(PROMPT, tokens, float(reward), logprobs=np.zeros(len(mask))))
        group = row // len(rewards[0])
        samples.append(Sample(rollouts[-1].token_ids, loss_mask, weights, group=group, **placed))
    size = len(rewards[0])
    groups = [
        Group(Prompt(f"p:{i}", PROMPT, [], {}), 0, tuple(rollouts[i * size : (i + 1) * size]))
        for i in range(len(rewards))
    ]
    return assemble.Batch(groups, np.ravel(rewards), samples)


def given_by(batch: assemble.Batch, block: AlgorithmBlock) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of the loss tokens; everything else must be 0."""
    advantages, returns = [], []
    for sample in assemble.with_advantages(batch, batch.samples, block):
        assert sample.advantages is not None
        assert not sample.advantages[~sample.loss_mask].any()
        advantages.append(sample.advantages[sample.loss_mask].tolist())
        if sample.returns is not None:
            assert not sample.returns[~sample.loss_mask].any()
            returns.append(sample.returns[sample.loss_mask].tolist())
    return advantages, returns


def test_gae_skips_what_the_mask_leaves_out_and_the_reward_lands_on_the_last_loss_token():
    # Loss tokens with values 1, 2, 3; gamma 1, lambda 1/2; reward 6. Deltas: 2 - 1 = 1, 3 - 2 = 1, 6 - 3 = 3.
    # A_3 = 3; A_2 = 1 + 3/2 = 2.5; A_1 = 1 + 2.5/2 = 2.25.
    batch = batch_of([[6.0]], [[1, 0, 0, 1, 0, 1, 0, 0]], old_values=[[1.0, 2.0, 3.0]])
    block = algorithm_of("ppo", advantage={"whiten": False, "gae_lambda": 0.5}, kl={"coef": 0.0})
    advantages, returns = given_by(batch, block)
    assert advantages == [[2.25, 2.5, 3.0]]
    assert returns == [[3.25, 4.5, 6.0]]


def test_what_follows_a_token_is_discounted_by_loss_tokens_and_loses_their_penalties_alone():
    # Penalties 0.1 * (old - ref) = 1, 2, 4; reward 8; gamma 1/2: 8 - 4 = 4; -2 + 4/2 = 0; -1 + 0 = -1.
    fields = {"old_logprobs": [[-1.0, -2.0, -3.0]], "ref_logprobs": [[-11.0, -22.0, -43.0]]}
    batch = batch_of([[8.0]], [[0, 1, 1, 0, 0, 1]], **fields)
    block = algorithm_of("reinforce++", advantage={"whiten": False, "gamma": 0.5}, kl={"coef": 0.1})
    advantages, _ = given_by(batch, block)
    assert advantages[0] == pytest.approx([-1.0, 0.0, 4.0], abs=1e-6)


def test_whitening_counts_loss_tokens_alone():
    # Group mean 2: -1 on one token, 1 on two. Mean 1/3, squares 16/9 + 4/9 + 4/9, variance 4/3.
    batch = batch_of([[1.0, 3.0]], [[0, 1, 0], [1, 0, 1]])
    advantages, _ = given_by(batch, algorithm_of("reinforce++_baseline"))
    assert advantages[0] == pytest.approx([-4 / 3 / (4 / 3) ** 0.5])
    assert advantages[1] == pytest.approx([2 / 3 / (4 / 3) ** 0.5] * 2)


def test_the_trainers_own_logprobs_go_before_the_engines_in_the_kl():
    # rloo: 0.5 * (-1 - -3) = 1 off the first reward; the second has none to lose.
    fields = {"old_logprobs": [[-9.0], [-9.0]], "proximal_logprobs": [[-1.0], [-2.0]]}
    batch = batch_of([[1.0, 0.0]], [[0, 1], [1]], ref_logprobs=[[-3.0], [-2.0]], **fields)
    advantages, _ = given_by(batch, algorithm_of("rloo", kl={"coef": 0.5}))
    assert advantages == [[0.0], [0.0]]
    assert kl_of_sequences(batch.samples) == 1.0
    without = [replace(sample, proximal_logprobs=None, old_logprobs=None) for sample in batch.samples]
    with pytest.raises(AssertionError, match="needs the policy's logprobs"):
        assemble.with_advantages(batch, without, algorithm_of("rloo", kl={"coef": 0.5}))


def test_a_completion_left_out_whole_counts_what_it_wrote_and_a_tools_output_is_never_counted():
    batch = batch_of([[1.0, 0.0]], [[1, 0, 0, 1, 1], [0, 0]])
    assert batch.num_sampled_tokens.tolist() == [3, 2]


ESTIMATORS = ("gae", "return", "group_mean", "leave_one_out", "batch_mean")
REWARDS = [[1.0, NAN, -0.5], [2.0, 0.25, 3.0], [0.5, 1.5, -2.0]]


def by_definition(rewards, tokens, estimator, gamma, lam, coef):
    """Sums over pairs of loss tokens. ``tokens``: (logprob, reference's, value) of every loss token of each row."""
    totals = []
    for reward, of_row in zip(np.ravel(rewards), tokens, strict=True):
        totals.append(reward - coef * sum(old - ref for old, ref, _ in of_row))
    size = len(rewards[0])
    advantages = []
    for row, (reward, of_row) in enumerate(zip(np.ravel(rewards), tokens, strict=True)):
        last = len(of_row) - 1
        if np.isnan(reward):
            advantages.append([0.0] * len(of_row))
            continue
        if estimator in ("gae", "return"):
            steps = [-coef * (old - ref) + (reward if t == last else 0.0) for t, (old, ref, _) in enumerate(of_row)]
            decay = gamma
            if estimator == "gae":
                after = [*(value for _, _, value in of_row[1:]), 0.0]
                steps = [r + gamma * after[t] - of_row[t][2] for t, r in enumerate(steps)]
                decay = gamma * lam
            advantages.append([sum(decay ** (u - t) * steps[u] for u in range(t, last + 1)) for t in range(last + 1)])
            continue
        rows = range(len(totals)) if estimator == "batch_mean" else range(row // size * size, row // size * size + size)
        compared = [totals[r] for r in rows if not np.isnan(totals[r]) and (estimator != "leave_one_out" or r != row)]
        advantages.append([totals[row] - sum(compared) / len(compared)] * len(of_row))
    return advantages


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [False, True])
def test_any_mask_gives_the_advantages_of_its_loss_tokens_by_definition(estimator, whiten):
    random = np.random.default_rng(3)
    masks = [(random.random(int(n)) < 0.6).astype(int).tolist() for n in random.integers(4, 12, size=9)]
    # An unscored rollout and a truncated one have no loss token; the latter's reward is in its group's baseline.
    masks[1], masks[5] = [0] * len(masks[1]), [0] * len(masks[5])
    # One begins and ends outside the mask.
    masks[2] = [0, 1, 0, 0, 1, 1, 0]
    tokens = [[tuple(random.normal(size=3)) for _ in range(sum(mask))] for mask in masks]
    names = ("old_logprobs", "ref_logprobs", "old_values")
    fields = {name: [[token[i] for token in of_row] for of_row in tokens] for i, name in enumerate(names)}
    advantage = {"estimator": estimator, "whiten": whiten}
    if estimator in ("gae", "return"):
        advantage["gamma"] = 0.9
    if estimator == "gae":
        advantage["gae_lambda"] = 0.8
    else:
        del fields["old_values"]
    block = algorithm_of("rloo", advantage=advantage, kl={"coef": 0.3})
    actual, _ = given_by(batch_of(REWARDS, masks, **fields), block)
    expected = by_definition(REWARDS, tokens, estimator, 0.9, 0.8, 0.3)
    if whiten:
        flat = np.concatenate([np.array(row) for row in expected])
        expected = [(np.array(row) - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) for row in expected]
    assert sum(map(len, actual)) == sum(map(sum, masks))
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
