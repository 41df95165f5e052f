"""One optimizer update or several from a batch of samples: the part both loops share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from actors.policy_trainer import PolicyTrainer, combine
from actors.reference_model import ReferenceModel
from rlflow.batching import num_real_tokens, pack, unpack
from rlflow.driver.stage import Stage
from rlflow.types import Denominators, Sample


def update(
    stage: Stage,
    samples: Sequence[Sample],
    denominators: Denominators,
    *,
    learning_rate: float,
    temperature: float,
    unit_size: int = 1,
) -> dict[str, float]:
    """forward_backward on every rank, then one optimizer step. Returns the update's metrics."""
    trainer, block = stage.actors.trainer, stage.recipe.trainer
    started = time.perf_counter()
    batches = pack(samples, max_tokens=block.tokens_per_micro_batch, num_ranks=len(trainer), unit_size=unit_size)
    per_rank = trainer.call_each(
        PolicyTrainer.forward_backward, batches, stage.recipe.algorithm, denominators, temperature
    )
    stats = trainer.call_all(PolicyTrainer.optim_step, learning_rate)[0]
    seconds = time.perf_counter() - started
    metrics: dict[str, float] = {}
    for of_rank in per_rank:
        for name, value in of_rank.items():
            combine(metrics, name, value)
    return metrics | {
        "trainer/grad_norm": stats.grad_norm,
        "trainer/learning_rate": learning_rate,
        "trainer/skipped": float(stats.skipped),
        "perf/trained_tokens_per_s": num_real_tokens(batches) / seconds,
    }


def with_reference(stage: Stage, samples: Sequence[Sample], temperature: float) -> list[Sample]:
    """Adds the reference's logprobs to every sample."""
    reference = stage.actors.reference
    assert reference is not None
    batches = pack(samples, max_tokens=stage.recipe.trainer.tokens_per_micro_batch, num_ranks=len(reference))
    per_rank = reference.call_each(ReferenceModel.logprobs, batches, temperature)
    logprobs = _unpack_ranks(samples, batches, per_rank)
    return [replace(sample, ref_logprobs=values) for sample, values in zip(samples, logprobs, strict=True)]


def with_proximal(stage: Stage, samples: Sequence[Sample], temperature: float) -> list[Sample]:
    """Adds the trainer's own logprobs, taken before the first update of the batch."""
    trainer = stage.actors.trainer
    batches = pack(samples, max_tokens=stage.recipe.trainer.tokens_per_micro_batch, num_ranks=len(trainer))
    per_rank = trainer.call_each(PolicyTrainer.logprobs, batches, temperature)
    logprobs = _unpack_ranks(samples, batches, per_rank)
    return [replace(sample, proximal_logprobs=values) for sample, values in zip(samples, logprobs, strict=True)]


def _unpack_ranks(samples, batches, per_rank):
    flat_batches = [batch for rank in batches for batch in rank]
    return unpack(samples, flat_batches, [values for rank in per_rank for values in rank])
