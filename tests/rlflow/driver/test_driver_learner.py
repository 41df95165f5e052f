"""How micro-batches are dealt to ranks, and results counted, when ranks share tokens: by actors that only count."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlflow.actors.trainer import UpdateStats
from rlflow.driver import learner
from rlflow.recipe import Recipe
from rlflow.recipe.presets import ALGORITHMS
from rlflow.types import Denominators, MicroBatch, Sample
from tests.local_actors import DonePending


class Ranks:
    """In the place of an ActorGroup."""

    timeout_s = 1.0

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[list[MicroBatch]] = []
        self.asked: list[Any] = []
        """Of the calls to all ranks, what followed the method."""

    def __len__(self) -> int:
        return self.size

    def start_each(self, method: Any, per_rank: Sequence[list[MicroBatch]], *args: Any) -> Any:
        assert len(per_rank) == self.size
        self.given = list(per_rank)
        answers = {"forward_backward": counted, "evaluate": counted, "logprobs": numbered, "values": numbered}
        return DonePending([SimpleNamespace(value=answers[method.__name__](rank)) for rank in per_rank])  # pyright: ignore

    def call_each(self, method: Any, per_rank: Sequence[list[MicroBatch]], *args: Any) -> Any:
        return self.start_each(method, per_rank).get(1.0)

    def call_all(self, method: Any, *args: Any) -> list[UpdateStats]:
        self.asked.append(args)
        return [UpdateStats(1.0, False)] * self.size

    def samples(self, rank: int) -> list[int]:
        return sorted(int(i) for batch in self.given[rank] for i in batch.sample_indices if i >= 0)


def counted(batches: list[MicroBatch]) -> dict[str, float]:
    lengths = [int(batch.loss_mask.sum()) for batch in batches]
    return {"loss/tokens": float(sum(lengths)), "ratio/value_max": float(max(lengths))}


def numbered(batches: list[MicroBatch]) -> list[np.ndarray]:
    return [batch.token_ids.astype(np.float32) for batch in batches]


def samples(count: int) -> list[Sample]:
    """Of unlike lengths; sample i has tokens of 100 i and more."""
    found = []
    for i in range(count):
        tokens = (100 * (i + 1) + np.arange(3 + i % 4)).astype(np.int32)
        found.append(Sample(tokens, np.arange(len(tokens)) > 0, np.zeros(len(tokens), dtype=np.float32)))
    return found


def stage(name: str, share: int, trainer: int, critic: int = 0, reference: int = 0) -> Any:
    row = ALGORITHMS[name]
    recipe = Recipe.model_validate(
        {
            "algorithm": {"name": name, **row.defaults, **({"critic": {"workers": critic}} if critic else {})},
            "model": {"path": "a/b"},
            "data": {"train": {"path": "a/b"}},
            "rewards": [{"name": "exact_match"}] if row.family == "online" else [],
            "trainer": {"workers": trainer, "sequence_parallel": share, "tokens_per_micro_batch": 8},
            "run": {"steps": 1},
        }
    )
    actors = SimpleNamespace(
        trainer=Ranks(trainer),
        critic=Ranks(critic) if critic else None,
        reference=Ranks(reference) if reference else None,
    )
    return SimpleNamespace(recipe=recipe, algorithm=recipe.algorithm, actors=actors, attention_cost=0.0)


def update(of: Any, batch: list[Sample]) -> dict[str, float]:
    return learner.update(of, batch, Denominators(1, 1, 1), learning_rate=0.1)


@pytest.mark.parametrize(("workers", "share"), [(2, 1), (2, 2), (4, 2), (6, 3)])
def test_ranks_that_share_tokens_get_the_same_and_count_once(monkeypatch, workers, share):
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(learner.time, "perf_counter", lambda: next(clock))
    of, batch = stage("grpo", share, workers), samples(9)
    metrics = update(of, batch)
    ranks = of.actors.trainer
    for rank in range(workers):
        assert ranks.samples(rank) == ranks.samples(rank // share * share)
    assert sorted(i for rank in range(0, workers, share) for i in ranks.samples(rank)) == list(range(9))
    assert metrics["loss/tokens"] == sum(sample.loss_mask.sum() for sample in batch)
    assert metrics["ratio/value_max"] == max(int(b.loss_mask.sum()) for rank in ranks.given for b in rank)
    assert metrics["perf/trained_tokens_per_s"] == sum(len(sample.token_ids) for sample in batch)
    assert learner.evaluate(of, batch, Denominators(1, 1, 1))["loss/tokens"] == metrics["loss/tokens"]


def test_results_of_tokens_come_back_once_in_the_order_of_the_samples():
    of, batch = stage("grpo", 2, 4), samples(7)
    for sample, values in zip(batch, learner.trainer_logprobs(of, batch), strict=True):
        assert values.tolist() == sample.token_ids.tolist()


def test_pairs_stay_together():
    of = stage("dpo", 2, 4)
    update(of, samples(6))
    for rank in range(4):
        assert all(i ^ 1 in of.actors.trainer.samples(rank) for i in of.actors.trainer.samples(rank))


def test_the_critic_shares_tokens_over_its_own_ranks():
    of, batch = stage("ppo", 2, 4, critic=2), samples(7)
    assert update(of, batch)["loss/tokens"] == sum(sample.loss_mask.sum() for sample in batch)
    assert of.actors.critic.samples(0) == of.actors.critic.samples(1) == list(range(7))
    with_values = learner.with_values(of, batch)
    assert [s.old_values.tolist() for s in with_values if s.old_values is not None] == [
        s.token_ids.tolist() for s in batch
    ]


def test_reference_actors_do_not_share_tokens():
    of, batch = stage("dpo", 2, 2, reference=2), samples(6)
    learner.reference_logprobs(of, batch)
    reference = of.actors.reference
    assert sorted(reference.samples(0) + reference.samples(1)) == list(range(6))
    assert reference.samples(0) and reference.samples(1)


@pytest.mark.parametrize("critic_only", [False, True])
def test_the_critic_has_a_learning_rate_of_its_own(critic_only):
    of = stage("ppo", 1, 2, critic=1)
    metrics = learner.update(of, samples(4), Denominators(1, 1, 1), learning_rate=0.1, critic_only=critic_only)
    assert of.actors.critic.asked == [(of.algorithm.critic.learning_rate,)] != [(0.1,)]
    assert metrics["critic/learning_rate"] == of.algorithm.critic.learning_rate
    assert of.actors.trainer.asked == ([] if critic_only else [(0.1,)])
    assert ("trainer/learning_rate" in metrics) is not critic_only
