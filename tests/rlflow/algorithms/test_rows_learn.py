"""Every row on a bigram policy: the loop of the driver without its actors, with several updates a batch."""

import numpy as np
import pytest
import torch
from toy_policy import VOCABULARY, logprobs_of, new_policy, preference_block, run, samples_for, weigh

from rlflow.algorithms.advantages import token_advantages
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.kl_reward import kl_penalty
from rlflow.algorithms.policy_objectives import value_objective
from rlflow.algorithms.preference_objectives import PREFERENCE_LOSSES
from rlflow.algorithms.selections import with_selection
from rlflow.batching import pack
from rlflow.recipe import ALGORITHMS, AlgorithmBlock, algorithm_of
from rlflow.types import Sample

GOOD = 3
"""The token that is rewarded."""
PROMPTS, GROUP, LENGTH = 4, 4, 6


def rollouts(policy: torch.Tensor, random: np.random.Generator) -> list[np.ndarray]:
    probabilities = torch.softmax(policy.detach(), dim=1).numpy()
    rows = []
    for index in range(PROMPTS * GROUP):
        tokens = [index // GROUP]
        for _ in range(int(random.integers(2, LENGTH))):
            row = probabilities[tokens[-1]]
            tokens.append(int(random.choice(VOCABULARY, p=row / row.sum())))
        rows.append(np.array(tokens, dtype=np.int32))
    return rows


def per_token(table: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """Log-softmax of a bigram table at the tokens after the first, float32 [T]."""
    logprobs = torch.log_softmax(table.detach(), dim=1).numpy()
    return np.append(0.0, logprobs[tokens[:-1], tokens[1:]]).astype(np.float32)


def samples_of(policy, reference, values, rows, block: AlgorithmBlock) -> tuple[list[Sample], float]:
    old, ref = ([per_token(table, row) for row in rows] for table in (policy, reference))
    rewards = np.array([np.mean(row[1:] == GOOD) for row in rows])
    coef = block.kl.coef if block.kl.placement == "reward" else 0.0
    penalties = [coef * kl_penalty(block.kl.estimator, a[1:], b[1:]) for a, b in zip(old, ref, strict=True)]
    old_values = [values.detach().numpy()[row[:-1]] for row in rows]
    # Any rollout that is not trained itself is as good a baseline as the greedy one.
    is_baseline = np.tile(np.arange(GROUP) < block.advantage.num_greedy, PROMPTS)
    groups = np.repeat(np.arange(PROMPTS), GROUP)
    advantages, returns = token_advantages(
        rewards, groups, penalties, block.advantage, old_values, is_baseline=is_baseline
    )
    samples = [
        Sample(
            token_ids=row,
            loss_mask=(np.arange(len(row)) > 0) & ~is_baseline[i],
            loss_weights=np.zeros(len(row), dtype=np.float32),
            advantages=np.append(0.0, advantages[i]).astype(np.float32),
            old_logprobs=old[i],
            proximal_logprobs=old[i],
            ref_logprobs=ref[i],
            old_values=np.append(0.0, old_values[i]).astype(np.float32),
            returns=np.append(0.0, returns[i]).astype(np.float32),
        )
        for i, row in enumerate(rows)
    ]
    return samples, float(rewards.mean())


def update_critic(values: torch.Tensor, samples, denominators, block: AlgorithmBlock, optimizer) -> None:
    batch = TensorBatch.from_numpy(pack(samples, max_tokens=10_000, num_ranks=1)[0][0], "cpu")
    optimizer.zero_grad()
    loss, _ = value_objective(values[batch.token_ids.roll(1)], None, batch, block, denominators)
    loss.backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.task == "online"])
def test_reward_rises_with_two_epochs_of_two_updates_a_batch(name):
    # A GSPO ratio may move by 4e-4 only: wider, so that a few dozen steps of a toy can show it.
    wide = {"loss": {"clip_low": 0.1, "clip_high": 0.1}} if name.startswith("gspo") else {}
    block = algorithm_of(name, **wide, group_size=GROUP)
    random, policy = np.random.default_rng(0), new_policy()
    reference = policy.detach().clone()
    values = torch.zeros(VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimizer, critic = torch.optim.Adam([policy], lr=0.1), torch.optim.Adam([values], lr=0.1)
    mean_rewards, ratios = [], []
    for _ in range(15):
        samples, mean_reward = samples_of(policy, reference, values, rollouts(policy, random), block)
        mean_rewards.append(mean_reward)
        for half in (0, 1, 0, 1):
            part = samples[half * len(samples) // 2 :][: len(samples) // 2]
            weighed, denominators = weigh(part, block, GROUP)
            weighed = with_selection(weighed, block.loss, 0, f"half {half}")
            _, _, metrics = run(policy, weighed, denominators, block)
            ratios.append(metrics["ratio/value_max"])
            optimizer.step()
            if block.advantage.estimator == "gae":
                update_critic(values, weighed, denominators, block, critic)
    assert max(ratios) > 1.05, "later updates of a batch must be off-policy"
    assert np.mean(mean_rewards[-3:]) > np.mean(mean_rewards[:3]) + 0.2


def margin(policy: torch.Tensor, samples: list[Sample]) -> float:
    sums = []
    for sample in samples:
        logprobs, _ = logprobs_of(policy, pack([sample], max_tokens=10_000, num_ranks=1)[0][0])
        sums.append(float(logprobs[torch.tensor(sample.loss_mask)].mean().detach()))
    return float(np.mean(sums[0::2]) - np.mean(sums[1::2]))


# DiscoPOP's loss has a second minimum on the wrong side and pushes towards it from the reference.
PAIRWISE = [f"dpo:{loss}" for loss in PREFERENCE_LOSSES if loss not in ("discopop", "function")]


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo", "kto", "apo_zero_unpaired", *PAIRWISE])
def test_chosen_answers_gain_on_rejected_ones(name):
    row, _, loss = name.partition(":")
    fields = preference_block(loss) if loss else {}
    block = algorithm_of(row, preference=fields)
    samples, policy = samples_for(row), new_policy()
    for index, sample in enumerate(samples):
        reference = per_token(policy, sample.token_ids) if loss != "orpo" else np.zeros_like(sample.ref_logprobs)
        numbers = {"ref_logprobs": reference, "rank_margin": 0.0, "rank_partner": 0.0, "batch_kl": 0.0}
        samples[index] = Sample(**{n: getattr(sample, n) for n in Sample.__slots__} | numbers)
    samples, denominators = weigh(samples, block)
    before = margin(policy, samples)
    optimizer = torch.optim.SGD([policy], lr=0.1)
    for _ in range(10):
        run(policy, samples, denominators, block)
        optimizer.step()
    assert margin(policy, samples) > before
