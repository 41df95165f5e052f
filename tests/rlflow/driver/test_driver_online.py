"""What one online step asks of the models, by ranks that only write down what they were given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from counting_ranks import Ranks, filled, learner_of, recipe_of

from rlflow.driver import assemble
from rlflow.driver.learner import Learner
from rlflow.metrics import Metric
from rlflow.types import Group, MicroBatch, Prompt, Rollout, Sample
from tests.flat_rollouts import flat

PROMPT = np.array([10, 11], dtype=np.int32)
RATE = 8.0
FOUR_UPDATES = {"groups": {"updates_per_step": 2, "epochs_per_step": 2}}


def make(name: str, rollout: dict[str, Any], trainer: dict[str, Any], **algorithm: Any) -> tuple[Learner, Ranks]:
    """A learner of six steps, and the policy's ranks. Metrics count the updates; forward passes give the number of
    their kind."""
    recipe = recipe_of(
        name,
        algorithm={"group_size": 2, **algorithm},
        data={"prompts_per_step": 2},
        rollout=rollout,
        trainer={"learning_rate": RATE, **trainer},
        run={"steps": 6},
    )
    number = 0

    def count(batches: list[MicroBatch]) -> dict[str, Metric]:
        nonlocal number
        number += 1
        return {how: Metric(float(number), "sum", how) for how in ("first", "mean", "max")}

    policy = Ranks(1, {"forward_backward": count, "logprobs": filled(-3.0)})
    others = {"reference": Ranks(1, {"logprobs": filled(-5.0)})} if recipe.places_reference else {}
    if recipe.critic is not None:
        others["critic"] = Ranks(1, {"values": filled(0.25), "forward_backward": lambda batches: {}})
    return learner_of(recipe, 6, trainer=policy, **others), policy


def train(learner: Learner, step: int = 0, engine_logprobs: bool = True) -> tuple[list[Sample], dict[str, float]]:
    """A step on two groups, as the loop does it."""

    def rollout(reward: float) -> Rollout:
        return flat(PROMPT, [20, 21], reward)

    groups = [Group(Prompt(f"p:{i}", PROMPT, [], {}), 0, (rollout(1.0), rollout(i))) for i in (0.0, 0.5)]
    batch = assemble.assemble(groups, learner.algorithm, 6, engine_logprobs=engine_logprobs)
    samples = assemble.with_advantages(batch, learner.score(batch.samples), learner.algorithm)
    return samples, learner.update(samples, step)


def updates_of(policy: Ranks) -> list[list[MicroBatch]]:
    return [rank for method, given in policy.calls for rank in given if method == "forward_backward"]


def test_a_metric_is_of_the_first_update_of_all_of_them_or_the_largest_as_it_says():
    learner, _ = make("dapo", {}, {}, **FOUR_UPDATES)
    _, metrics = train(learner)
    assert (metrics["first"], metrics["mean"], metrics["max"]) == (1.0, 2.5, 4.0)


def test_the_first_updates_ratio_is_of_its_own_logprobs_and_the_others_of_before_it():
    learner, policy = make("dapo", {}, {}, **FOUR_UPDATES)
    train(learner)
    first, *others = updates_of(policy)
    assert [batch.proximal_logprobs for batch in first] == [None]
    assert all((batch.proximal_logprobs == -3.0).all() for update in others for batch in update)
    assert [sum(len(batch.sample_indices) for batch in update) for update in (first, *others)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("row", "options", "rollout", "expected"),
    [
        ("dapo", {}, {}, False),
        ("ppo", {}, {}, False),
        ("dapo", FOUR_UPDATES, {}, True),
        ("dapo", {**FOUR_UPDATES, "correction": {"old_policy": "engine", "mode": "none"}}, {}, False),
        ("dapo", {"correction": {"mode": "none"}}, {"top_p": 0.9}, False),
        # A KL in the reward, or one with a target, needs the policy's logprobs, and the engine's are no such thing.
        ("ppo", {"correction": {"mode": "none"}}, {"top_p": 0.9}, True),
        ("grpo", {"correction": {"mode": "none"}}, {"top_k": 3}, False),
        ("grpo", {"correction": {"mode": "none"}, "kl": {"target": 0.1}}, {"top_k": 3}, True),
    ],
)
def test_a_pass_for_the_trainers_logprobs_is_made_where_it_is_needed_alone(row, options, rollout, expected):
    learner, policy = make(row, rollout, {}, **options)
    samples, metrics = train(learner, engine_logprobs=not rollout)
    assert all((sample.proximal_logprobs is not None) == expected for sample in samples)
    assert ("logprobs" in [method for method, _ in policy.calls]) == expected
    if "kl/sequence" in metrics:
        # Two tokens, of the trainer's -3 and the reference's -5.
        assert metrics["kl/sequence"] == 4.0


def test_while_the_critic_warms_up_it_learns_alone_and_the_policys_schedule_has_not_begun():
    learner, policy = make(
        "ppo",
        {},
        {"schedule": "linear", "warmup_steps": 1},
        critic={"warmup_steps": 2, "learning_rate": 0.5},
        groups={"updates_per_step": 2},
    )
    for step in range(6):
        _, metrics = train(learner, step)
        assert metrics["critic/learning_rate"] == 0.5
        assert len(policy.rates) == max(0, step - 1) * 2
    # Two warm-up updates, then six from the peak down, over the four steps that are left.
    rates = [rate / RATE for rate in policy.rates]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
