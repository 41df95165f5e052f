"""A bigram policy and random samples: enough of a model to take gradients through every objective."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.distillation import generalized_jsd
from rlflow.algorithms.objective_parts import Objective
from rlflow.algorithms.objectives import objective_of
from rlflow.algorithms.reductions import count_denominators, loss_weights, preference_weights
from rlflow.batching import pack
from rlflow.metrics import over_ranks, values_of
from rlflow.recipe import ALGORITHMS, AlgorithmBlock
from rlflow.types import Denominators, MicroBatch, Sample

VOCABULARY = 7
MAX_NEW_TOKENS = 16


def preference_block(loss: str) -> dict[str, object]:
    """The preference block of a loss, with the options it has."""
    is_smoothed = loss in ("sigmoid", "robust", "aot", "aot_unpaired", "exo_pair")
    return {"loss": loss, "label_smoothing": 0.1} if is_smoothed else {"loss": loss}


def new_policy(seed: int = 0) -> torch.Tensor:
    """float64 [V, V]: logits of the next token by the last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()


def logprobs_of(policy: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies [N]; NaN outside the loss mask, which nothing may read."""
    tokens = torch.tensor(batch.token_ids, dtype=torch.int64)
    table = torch.log_softmax(policy, dim=1)
    before = tokens.roll(1)
    outside = ~torch.tensor(batch.loss_mask)
    entropies = -(table.exp() * table).sum(dim=1)[before]
    return table[before, tokens].masked_fill(outside, torch.nan), entropies.masked_fill(outside, torch.nan)


def samples_for(name: str, count: int = 12, seed: int = 0) -> list[Sample]:
    """Random samples with every field a row may need: unequal lengths, holes in masks, some without loss tokens."""
    random = np.random.default_rng(seed)
    family = ALGORITHMS[name].family
    samples = []
    for index in range(count):
        prompt, length = int(random.integers(1, 5)), int(random.integers(1, MAX_NEW_TOKENS))
        total = prompt + length
        mask = np.zeros(total, dtype=bool)
        mask[prompt:] = random.random(length) < 0.9
        mask[-1] = True
        if family == "online" and index % 5 == 3:
            mask[:] = False

        def noise(scale: float, mean: float, size: int = total, mask: np.ndarray = mask) -> np.ndarray:
            return np.where(mask, mean + scale * random.normal(size=size), np.nan).astype(np.float32)

        samples.append(
            Sample(
                token_ids=random.integers(0, VOCABULARY, size=total).astype(np.int32),
                loss_mask=mask,
                loss_weights=np.zeros(total, dtype=np.float32),
                advantages=noise(1.0, 0.0),
                old_logprobs=noise(0.5, -2.0),
                proximal_logprobs=noise(0.5, -2.0),
                ref_logprobs=noise(0.5, -2.0),
                teacher_logprobs=noise(0.5, -2.0) if ALGORITHMS[name].task == "distillation" else None,
                old_values=noise(1.0, 0.0),
                returns=noise(1.0, 0.0),
                selected=np.where(mask, random.random(total) < 0.3, np.nan).astype(np.float32),
                label=0.0 if family == "online" else 1.0 if index % 2 == 0 else -1.0,
                reward_margin=(number := float(random.random())),
                rank_margin=number,
                rank_partner=number,
                batch_kl=0.3,
            )
        )
    return samples


def weigh(samples: list[Sample], block: AlgorithmBlock, group_size: int = 4) -> tuple[list[Sample], Denominators]:
    """Loss weights, as the driver gives them."""
    counts = np.array([int(sample.loss_mask.sum()) for sample in samples])
    if ALGORITHMS[block.name].objective in ("preference", "reward_model"):
        labels = np.array([sample.label for sample in samples])
        weights, denominators = preference_weights(block.reduction, counts, labels, MAX_NEW_TOKENS)
    else:
        groups = np.arange(len(samples)) // group_size
        denominators = count_denominators(counts, groups)
        weights = loss_weights(block.reduction, counts, groups, denominators, MAX_NEW_TOKENS)
    weighed = [
        replace(sample, loss_weights=np.where(sample.loss_mask, weight, 0).astype(np.float32))
        for sample, weight in zip(samples, weights, strict=True)
    ]
    return weighed, denominators


def run(
    policy: torch.Tensor,
    samples: list[Sample],
    denominators: Denominators,
    block: AlgorithmBlock,
    *,
    max_tokens: int = 10_000,
    num_ranks: int = 1,
    objective: Objective | None = None,
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a batch, in micro-batches over ranks."""
    pairwise_rows = ALGORITHMS[block.name].objective in ("preference", "reward_model")
    packed = pack(samples, max_tokens=max_tokens, num_ranks=num_ranks, unit_size=2 if pairwise_rows else 1)
    total, of_parts = 0.0, []
    policy.grad = None
    for micro_batch in (batch for rank in packed for batch in rank):
        loss, parts = _loss_of(policy, micro_batch, block, denominators, objective or objective_of(block))
        assert loss.requires_grad, "a rank without loss tokens must still take part in the backward pass"
        loss.backward()
        total += float(loss.detach())
        assert not any(metric.value.requires_grad for metric in parts.values())
        of_parts.append({name: metric._replace(value=float(metric.value)) for name, metric in parts.items()})
    assert policy.grad is not None
    return total, policy.grad.clone(), values_of(over_ranks(of_parts))


def _loss_of(policy, micro_batch, block, denominators, objective):
    batch = TensorBatch.from_numpy(micro_batch, "cpu")
    logprobs, entropies = logprobs_of(policy, micro_batch)
    if block.name == "gkd":
        tables = (torch.log_softmax(each, dim=1)[batch.token_ids.roll(1)] for each in (policy, new_policy(seed=1)))
        batch = replace(batch, divergences=generalized_jsd(*tables, block.distill.beta))
    if ALGORITHMS[block.name].objective == "reward_model":
        # A reward a sequence: of its last token's logits.
        last = torch.tensor([micro_batch.token_ids[end - 1] for _, end in pairwise(micro_batch.cu_seqlens)])
        return objective(policy.sum(dim=1)[last.long()], None, batch, block, denominators)
    return objective(logprobs, entropies, batch, block, denominators)
