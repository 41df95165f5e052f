"""The objectives that learn from judged answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlflow.algorithms import preference_losses
from rlflow.algorithms.batch import TensorBatch, segment_sum
from rlflow.algorithms.objective_parts import Metrics, mean
from rlflow.algorithms.own_losses import own_pair_loss
from rlflow.metrics import Metric
from rlflow.recipe import KTOBlock, PairBlock, RewardModelBlock
from rlflow.recipe.preference_blocks import DivergenceBlock
from rlflow.types import Denominators

PREFERENCE_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, TensorBatch, Any], torch.Tensor]] = {
    "sigmoid": lambda c, r, _, b: preference_losses.sigmoid(c, r, b.beta, b.label_smoothing, b.gamma),
    "hinge": lambda c, r, _, b: preference_losses.hinge(c, r, b.beta),
    "ipo": lambda c, r, _, b: preference_losses.ipo(c, r, b.beta),
    "robust": lambda c, r, _, b: preference_losses.robust(c, r, b.beta, b.label_smoothing),
    "exo_pair": lambda c, r, _, b: preference_losses.exo_pair(c, r, b.beta, b.label_smoothing),
    "nca_pair": lambda c, r, _, b: preference_losses.nca_pair(c, r, b.beta),
    "bco_pair": lambda c, r, _, b: preference_losses.bco_pair(c, r, b.beta),
    "sppo": lambda c, r, _, b: preference_losses.sppo(c, r, b.beta),
    "aot": lambda c, r, x, b: preference_losses.aot(c, r, _sides(x.rank_margins, x)[0], b.beta, b.label_smoothing),
    "aot_unpaired": lambda c, r, x, b: preference_losses.aot_unpaired(
        c, r, *_sides(x.rank_partners, x), b.beta, b.label_smoothing
    ),
    "apo_zero": lambda c, r, _, b: preference_losses.apo_zero(c, r, b.beta),
    "apo_down": lambda c, r, _, b: preference_losses.apo_down(c, r, b.beta),
    "discopop": lambda c, r, _, b: preference_losses.discopop(c, r, b.beta),
    "orpo": lambda c, r, _, b: preference_losses.orpo(c, r, b.beta),
    "function": lambda c, r, _, b: own_pair_loss(b, c, r),
}
"""``preference.loss`` -> function of chosen and rejected scores [B], the batch and the numbers of the kind's block."""


def preference_objective(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: PairBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over pairs of the pair's loss, plus sft_coef times the chosen answers' weighted cross-entropy.

    Args:
        logprobs: [N] with gradient. Pairs are adjacent sequences, chosen (label +1) before rejected (-1).
    """
    block = algorithm.preference
    tokens, logprobs = batch.loss_tokens(), logprobs[batch.loss_mask]
    log_ratios = _log_ratios(logprobs, tokens, block.reference_free)
    scores = segment_sum(log_ratios, tokens.sequence_ids, tokens.num_sequences)
    if isinstance(block, DivergenceBlock):
        scores = preference_losses.DIVERGENCES[block.divergence](scores)
    if block.length_normalized:
        scores = scores / torch.bincount(tokens.sequence_ids, minlength=tokens.num_sequences).clamp(min=1)
    chosen, rejected = _sides(scores, batch)
    assert len(chosen) == len(rejected), "pairs must stay together in a micro-batch"
    losses = PREFERENCE_LOSSES[block.loss](chosen, rejected, batch, block)
    loss = losses.sum() / max(1, denominators.num_groups)
    metrics = {"loss/preference": Metric(loss.detach())}
    if block.sft_coef:
        of_chosen = batch.labels[tokens.sequence_ids] > 0
        sft = -(tokens.loss_weights * logprobs)[of_chosen].sum()
        loss = loss + block.sft_coef * sft
        metrics["loss/sft"] = Metric(sft.detach())
    metrics["loss/total"] = Metric(loss.detach())
    metrics |= _pair_metrics(block.beta * chosen.detach(), block.beta * rejected.detach(), denominators)
    sums = segment_sum(logprobs.detach(), tokens.sequence_ids, tokens.num_sequences)
    metrics["preference/chosen_logprob"] = mean(sums[batch.labels > 0], denominators.num_groups)
    metrics["preference/rejected_logprob"] = mean(sums[batch.labels < 0], denominators.num_groups)
    return loss, metrics


def kto_objective(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: KTOBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over examples of KTO's loss."""
    block = algorithm.preference
    tokens, logprobs = batch.loss_tokens(), logprobs[batch.loss_mask]
    scores = segment_sum(_log_ratios(logprobs, tokens), tokens.sequence_ids, tokens.num_sequences)
    real = batch.labels != 0
    assert batch.batch_kls is not None
    scores, labels, kl = scores[real], batch.labels[real], batch.batch_kls[real]
    losses = preference_losses.kto(scores, labels, kl, block.beta, block.desirable_weight, block.undesirable_weight)
    loss = losses.sum() / max(1, denominators.num_sequences)
    agreement = labels * block.beta * (scores - kl).detach()
    return loss, {
        "loss/kto": Metric(loss.detach()),
        "kto/kl": mean(kl, denominators.num_sequences),
        "kto/margin": mean(agreement, denominators.num_sequences),
        "kto/accuracy": mean((agreement > 0).to(agreement.dtype), denominators.num_sequences),
        "kto/desirable_fraction": mean((labels > 0).to(agreement.dtype), denominators.num_sequences),
    }


def reward_model_objective(
    scores: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: RewardModelBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over pairs of the Bradley-Terry loss.

    Args:
        scores: [S], the model's reward of each sequence, with gradient. Pairs are adjacent, chosen first.
    """
    chosen, rejected = _sides(scores, batch)
    margins, _ = _sides(batch.reward_margins, batch)
    losses = preference_losses.bradley_terry(chosen, rejected, margins, algorithm.preference.center_coef)
    loss = losses.sum() / max(1, denominators.num_groups)
    return loss, {
        "loss/reward_model": Metric(loss.detach()),
        **_pair_metrics(chosen.detach(), rejected.detach(), denominators),
    }


def _log_ratios(logprobs: torch.Tensor, tokens: TensorBatch, reference_free: bool = False) -> torch.Tensor:
    """logprobs [N] minus the reference's, unless the reference is uniform."""
    if reference_free:
        return logprobs
    assert tokens.ref_logprobs is not None, "the loss compares with a reference: give ref_logprobs"
    return logprobs - tokens.ref_logprobs


def _sides(values: torch.Tensor | None, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values [S], those of the chosen and of the rejected answers, [B] each."""
    assert values is not None, "the loss looks at a number of each sequence that the samples do not have"
    return values[batch.labels > 0], values[batch.labels < 0]


def _pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor, denominators: Denominators) -> Metrics:
    """Of rewards [B]."""
    return {
        "preference/chosen_reward": mean(chosen, denominators.num_groups),
        "preference/rejected_reward": mean(rejected, denominators.num_groups),
        "preference/margin": mean(chosen - rejected, denominators.num_groups),
        "preference/accuracy": mean((chosen > rejected).to(chosen.dtype), denominators.num_groups),
    }
