"""What the loops ask of the models: logprobs and values of samples, and one optimizer update from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from rlflow.actors.actor_group import ActorGroup
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.trainer import Trainer, combine
from rlflow.actors.value_trainer import ValueTrainer
from rlflow.batching import num_real_tokens, pack, unpack
from rlflow.driver.stage import Stage
from rlflow.types import Denominators, MicroBatch, Sample

T = TypeVar("T")


def update(
    stage: Stage,
    samples: Sequence[Sample],
    denominators: Denominators,
    *,
    learning_rate: float,
    temperature: float = 1.0,
    critic_only: bool = False,
) -> dict[str, float]:
    """forward_backward on every rank, then one optimizer step: of the policy, and of the critic where there is one.

    Returns:
        The update's metrics.
    """
    learners: dict[str, tuple[ActorGroup, float]] = {}
    if not critic_only:
        learners["trainer"] = (stage.actors.trainer, learning_rate)
    if stage.actors.critic is not None:
        learners["critic"] = (stage.actors.critic, stage.algorithm.critic.learning_rate)
    started = time.perf_counter()
    batches = {name: _pack(stage, samples, group) for name, (group, _) in learners.items()}
    pending = [
        group.start_each(
            Trainer.forward_backward, _dealt(batches[name], group), stage.algorithm, denominators, temperature
        )
        for name, (group, _) in learners.items()
    ]
    metrics: dict[str, float] = {}
    for (name, (group, _)), of_group in zip(learners.items(), pending, strict=True):
        metrics |= _combined(_once(of_group.get(group.timeout_s), batches[name]))
    for name, (group, rate) in learners.items():
        stats = group.call_all(Trainer.optim_step, rate)[0]
        metrics |= {
            f"{name}/grad_norm": stats.grad_norm,
            f"{name}/learning_rate": rate,
            f"{name}/skipped": float(stats.skipped),
        }
    trained = num_real_tokens(next(iter(batches.values())))
    return metrics | {"perf/trained_tokens_per_s": trained / (time.perf_counter() - started)}


def evaluate(stage: Stage, samples: Sequence[Sample], denominators: Denominators) -> dict[str, float]:
    """The objective's metrics on samples that are not trained."""
    trainer = stage.actors.trainer
    batches = _pack(stage, samples, trainer)
    per_rank = trainer.call_each(Trainer.evaluate, _dealt(batches, trainer), stage.algorithm, denominators)
    return _combined(_once(per_rank, batches))


def trainer_logprobs(stage: Stage, samples: Sequence[Sample], temperature: float = 1.0) -> list[np.ndarray]:
    """Of the current policy, float32 [T] a sample, 0 where nothing is trained."""
    return _each(stage, stage.actors.trainer, PolicyTrainer.logprobs, samples, temperature)


def reference_logprobs(stage: Stage, samples: Sequence[Sample], temperature: float = 1.0) -> list[np.ndarray]:
    """Of the reference, float32 [T] a sample: by its own actors, or by a trainer of adapters."""
    if not stage.recipe.places_reference:
        return _each(stage, stage.actors.trainer, PolicyTrainer.reference_logprobs, samples, temperature)
    assert stage.actors.reference is not None
    return _each(stage, stage.actors.reference, ReferenceModel.logprobs, samples, temperature)


def with_reference(stage: Stage, samples: Sequence[Sample], temperature: float = 1.0) -> list[Sample]:
    """Adds the reference's logprobs to every sample."""
    logprobs = reference_logprobs(stage, samples, temperature)
    return [replace(sample, ref_logprobs=values) for sample, values in zip(samples, logprobs, strict=True)]


def with_proximal(stage: Stage, samples: Sequence[Sample], temperature: float) -> list[Sample]:
    """Adds the trainer's own logprobs, taken before the first update of the batch."""
    logprobs = trainer_logprobs(stage, samples, temperature)
    return [replace(sample, proximal_logprobs=values) for sample, values in zip(samples, logprobs, strict=True)]


def with_values(stage: Stage, samples: Sequence[Sample]) -> list[Sample]:
    """Adds the critic's values, taken before the first update of the batch."""
    assert stage.actors.critic is not None
    values = _each(stage, stage.actors.critic, ValueTrainer.values, samples)
    return [replace(sample, old_values=of_sample) for sample, of_sample in zip(samples, values, strict=True)]


def _each(
    stage: Stage, group: ActorGroup, method: Callable[..., list[np.ndarray]], samples: Sequence[Sample], *args: Any
) -> list[np.ndarray]:
    """One number a token from a forward pass, back in the order of the samples."""
    batches = _pack(stage, samples, group, unit_size=1)
    per_rank = group.call_each(method, _dealt(batches, group), *args)
    values = [value for of_one in _once(per_rank, batches) for value in of_one]
    return unpack(samples, [batch for of_one in batches for batch in of_one], values)


def _pack(
    stage: Stage, samples: Sequence[Sample], group: ActorGroup, unit_size: int | None = None
) -> list[list[MicroBatch]]:
    """A list of micro-batches for each rank, or for each few ranks that share them: those of a reference never do."""
    share = 1 if group is stage.actors.reference else stage.recipe.trainer.sequence_parallel
    return pack(
        samples,
        max_tokens=stage.recipe.trainer.tokens_per_micro_batch,
        num_ranks=len(group) // share,
        unit_size=unit_size or (2 if stage.recipe.is_paired else 1),
        attention_cost=stage.attention_cost,
    )


def _dealt(batches: Sequence[list[MicroBatch]], group: ActorGroup) -> list[list[MicroBatch]]:
    """What each rank is given: neighbours that share micro-batches the same."""
    return [of_one for of_one in batches for _ in range(len(group) // len(batches))]


def _once(per_rank: Sequence[T], batches: Sequence[list[MicroBatch]]) -> Sequence[T]:
    """Of ranks that share micro-batches, and so have the same results, those of one."""
    return per_rank[:: len(per_rank) // len(batches)]


def _combined(per_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for of_rank in per_rank:
        for name, value in of_rank.items():
            combine(metrics, name, value)
    return metrics
