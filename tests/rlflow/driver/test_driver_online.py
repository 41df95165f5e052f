"""What one online step asks of the trainers, by updates that only write down what they were given."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rlflow.driver import assemble, learner, online
from rlflow.driver.stage import Stage
from rlflow.recipe import Recipe
from rlflow.recipe.presets import ALGORITHMS
from rlflow.recipe.yaml_source import merge
from rlflow.types import Group, Prompt, Rollout, Sample

PROMPT = np.array([10, 11], dtype=np.int32)
RATE = 8.0


def stage_of(name: str, rollout: dict[str, Any], trainer: dict[str, Any], **algorithm: Any) -> Any:
    given = {"name": name, **merge(ALGORITHMS[name].defaults, {"group_size": 2, **algorithm})}
    recipe = Recipe.model_validate(
        {
            "algorithm": given,
            "model": {"path": "a/b"},
            "data": {"train": {"path": "a/b"}, "prompts_per_step": 2},
            "rewards": [{"name": "exact_match"}],
            "rollout": rollout,
            "trainer": {"learning_rate": RATE, **trainer},
            "run": {"steps": 6},
        }
    )
    stage: Any = SimpleNamespace(
        recipe=recipe, algorithm=recipe.algorithm, clock=lambda phase: nullcontext(), count_skipped=lambda *_: None
    )
    stage.learning_rate = lambda *of_update: Stage.learning_rate(cast(Stage, stage), *of_update)
    stage.adapt_kl = lambda kl, number: {"kl/sequence": kl}
    return stage


def batch_of(stage: Any, engine_logprobs: bool = True) -> assemble.Batch:
    def rollout(reward: float) -> Rollout:
        tokens, logprobs = np.array([20, 21], dtype=np.int32), np.array([-1.0, -2.0], dtype=np.float32)
        return Rollout(tokens, logprobs, 0, "stop", "", {"r": reward}, reward)

    groups = [Group(Prompt(f"p:{i}", PROMPT, [], {}), 0, (rollout(1.0), rollout(i))) for i in (0.0, 0.5)]
    return assemble.assemble(groups, stage.algorithm, 6, engine_logprobs=engine_logprobs)


@pytest.fixture
def updates(monkeypatch):
    """What every update was asked for; its metrics count the updates. Forward passes give the number of their kind."""
    asked: list[Any] = []

    def update(stage, samples, denominators, **options):
        asked.append(SimpleNamespace(samples=samples, **options))
        number = float(len(asked))
        return {"mismatch/kl": number, "ratio/mean": number, "ratio/value_max": number}

    def filled(value: float):
        return lambda stage, samples, *_: [np.full(len(s.token_ids), value, dtype=np.float32) for s in samples]

    monkeypatch.setattr(learner, "update", update)
    monkeypatch.setattr(learner, "trainer_logprobs", filled(-3.0))
    monkeypatch.setattr(learner, "reference_logprobs", filled(-5.0))
    monkeypatch.setattr(learner, "_each", lambda stage, group, method, samples, *_: filled(0.25)(stage, samples))
    return asked


def learn(stage: Any, step: int = 0, **batch: Any) -> tuple[list[Sample], dict[str, float]]:
    stage.actors = SimpleNamespace(critic=object())
    return online.learn(stage, batch_of(stage, **batch), step, num_steps=6)


FOUR_UPDATES = {"groups": {"updates_per_step": 2, "epochs_per_step": 2}}


def test_the_engines_mismatch_is_of_the_first_update_and_other_metrics_are_of_all(updates):
    stage = stage_of("dapo", {}, {}, **FOUR_UPDATES)
    _, metrics = learn(stage)
    assert metrics == {"mismatch/kl": 1.0, "ratio/mean": 2.5, "ratio/value_max": 4.0}


def test_the_first_updates_ratio_is_of_its_own_logprobs_and_the_others_of_before_it(updates):
    learn(stage_of("dapo", {}, {}, **FOUR_UPDATES))
    proximal = [[sample.proximal_logprobs for sample in update.samples] for update in updates]
    assert proximal[0] == [None, None]
    assert all(values is not None and (values == -3.0).all() for update in proximal[1:] for values in update)
    assert [len(update.samples) for update in updates] == [2, 2, 2, 2]


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
def test_a_pass_for_the_trainers_logprobs_is_made_where_it_is_needed_alone(updates, row, options, rollout, expected):
    samples, metrics = learn(stage_of(row, rollout, {}, **options), engine_logprobs=not rollout)
    assert all((sample.proximal_logprobs is not None) == expected for sample in samples)
    if "kl/sequence" in metrics:
        # Two tokens, of the trainer's -3 and the reference's -5.
        assert metrics["kl/sequence"] == 4.0


def test_while_the_critic_warms_up_it_learns_alone_and_the_policys_schedule_has_not_begun(updates):
    stage = stage_of(
        "ppo",
        {},
        {"schedule": "linear", "warmup_steps": 1},
        critic={"warmup_steps": 2, "learning_rate": 0.5},
        groups={"updates_per_step": 2},
    )
    for step in range(6):
        learn(stage, step)
    assert [update.critic_only for update in updates] == [True] * 4 + [False] * 8
    # Two warm-up updates, then six from the peak down, over the four steps that are left.
    rates = [update.learning_rate / RATE for update in updates[4:]]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
