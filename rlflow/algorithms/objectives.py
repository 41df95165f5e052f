"""The words of the recipe bound to functions: a micro-batch to its share of the loss and of the metrics.

Every objective has the same arguments: what the model computed, the batch, the algorithm block and the denominators of
the optimizer batch. A metric is a sum divided by one of these denominators, so that adding over micro-batches and ranks
gives the batch's mean, or a maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlflow.algorithms import corrections, policy_losses, preference_losses
from rlflow.algorithms.batch import TensorBatch, segment_mean, segment_sum
from rlflow.algorithms.kl import KL_ESTIMATORS, k3, unbiased
from rlflow.algorithms.own_losses import own_pair_loss, own_policy_loss
from rlflow.algorithms.value_losses import value_loss
from rlflow.metrics import Metric
from rlflow.recipe import AlgorithmBlock, KTOBlock, OnlineBlock, PairBlock, RewardModelBlock
from rlflow.recipe.algorithm_blocks import BoundedWeightBlock, CISPOBlock, ClipBlock, OwnLossBlock, PolicyLossBlock
from rlflow.recipe.presets import ALGORITHMS
from rlflow.types import Denominators

Metrics = dict[str, Metric]
Objective = Callable[[torch.Tensor, torch.Tensor | None, TensorBatch, Any, Denominators], tuple[torch.Tensor, Metrics]]
"""The fourth is the algorithm, of the class that has the objective in rlflow.recipe.algorithm.BLOCKS."""

POLICY_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]] = {
    "clip": lambda ratio, _, adv, b: policy_losses.clip_loss(ratio, adv, b.clip_low, b.clip_high, b.dual_clip),
    "cispo": lambda ratio, logprobs, adv, b: policy_losses.cispo_loss(ratio, logprobs, adv, b.clip_low, b.clip_high),
    "sapo": lambda ratio, _, adv, b: policy_losses.sapo_loss(ratio, adv, b.tau_positive, b.tau_negative),
}
"""``loss.kind`` -> function of ratio, logprobs, advantages [N] and the numbers of the kind's block."""

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


def objective_of(algorithm: AlgorithmBlock) -> Objective:
    """The objective of the algorithm's row."""
    return OBJECTIVES[ALGORITHMS[algorithm.name].objective]


def policy_objective(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: OnlineBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """sum over loss tokens of weight * (policy loss * correction + kl.coef * KL - entropy_coef * entropy).

    The ratio's denominator is the trainer's logprobs of before the first update: ``proximal_logprobs``, and where they
    are absent, the current ones; with ``old_policy: engine`` it is the engine's.

    Args:
        logprobs, entropies: [N] under the current policy, the first with gradient.
        batch: Without ``old_logprobs`` where the engine's are of another distribution: then neither a correction nor a
            ratio may ask for them, and the mismatch is not measured.
    """
    block, correction, kl = algorithm.loss, algorithm.correction, algorithm.kl
    tokens, logprobs = batch.loss_tokens(), logprobs[batch.loss_mask]
    assert tokens.advantages is not None
    engine = tokens.old_logprobs
    proximal = logprobs.detach() if tokens.proximal_logprobs is None else tokens.proximal_logprobs
    denominator = proximal if correction.old_policy == "trainer" else engine
    assert denominator is not None, "old_policy: engine needs the engine's logprobs"
    log_ratio = logprobs - denominator
    ratio = policy_losses.RATIOS[block.ratio](log_ratio, tokens.sequence_ids, tokens.num_sequences)
    if isinstance(block, OwnLossBlock):
        policy_loss = own_policy_loss(block, tokens, ratio=ratio, logprobs=logprobs, old_logprobs=denominator)
    else:
        policy_loss = POLICY_LOSSES[block.kind](ratio, logprobs, tokens.advantages, block)
    metrics = _ratio_metrics(ratio.detach(), log_ratio.detach(), tokens.advantages, block, denominators)
    if engine is not None:
        metrics |= _mismatch_metrics(proximal, engine, denominators)
    if isinstance(correction, BoundedWeightBlock):
        assert engine is not None, "a correction needs the engine's logprobs"
        weights = corrections.mismatch_weights(
            proximal, engine, tokens.sequence_ids, tokens.num_sequences, correction.level
        )
        factors = corrections.CORRECTIONS[correction.mode](weights, correction.low, correction.high)
        outside = corrections.is_out_of_bounds(weights, correction.low, correction.high)
        policy_loss = policy_loss * factors
        metrics["correction/weight_mean"] = _token_mean(factors, denominators)
        metrics["correction/bounded_fraction"] = _token_mean(outside.to(ratio.dtype), denominators)

    loss = (tokens.loss_weights * policy_loss).sum()
    metrics["loss/policy"] = Metric(loss.detach())
    if tokens.ref_logprobs is not None:
        estimate = KL_ESTIMATORS[kl.estimator](logprobs, tokens.ref_logprobs)
        metrics["kl/ref"] = _token_mean(estimate, denominators)
        if kl.placement == "loss" and kl.coef:
            weighted = unbiased(estimate, log_ratio) if kl.unbiased_gradient else estimate
            loss = loss + kl.coef * (tokens.loss_weights * weighted).sum()
    if entropies is not None:
        entropies = entropies[batch.loss_mask]
        metrics["entropy"] = _token_mean(entropies, denominators)
        if block.entropy_coef:
            loss = loss - block.entropy_coef * (tokens.loss_weights * entropies).sum()
    metrics["loss/total"] = Metric(loss.detach())
    return loss, metrics


def sft_objective(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: AlgorithmBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """-sum over loss tokens of weight * log pi(y_t): cross-entropy; with the token reduction its mean per token."""
    mask = batch.loss_mask
    loss = -(batch.loss_weights[mask] * logprobs[mask]).sum()
    metrics = {"loss/sft": Metric(loss.detach())}
    if entropies is not None:
        metrics["entropy"] = _token_mean(entropies[mask], denominators)
    return loss, metrics


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
    reduce = segment_mean if block.length_normalized else segment_sum
    scores = reduce(_log_ratios(logprobs, tokens, block.reference_free), tokens.sequence_ids, tokens.num_sequences)
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
    metrics["preference/chosen_logprob"] = _mean(sums[batch.labels > 0], denominators.num_groups)
    metrics["preference/rejected_logprob"] = _mean(sums[batch.labels < 0], denominators.num_groups)
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
        "kto/kl": _mean(kl, denominators.num_sequences),
        "kto/margin": _mean(agreement, denominators.num_sequences),
        "kto/accuracy": _mean((agreement > 0).to(agreement.dtype), denominators.num_sequences),
        "kto/desirable_fraction": _mean((labels > 0).to(agreement.dtype), denominators.num_sequences),
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


def value_objective(
    values: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: OnlineBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """sum over loss tokens of weight * value loss: what PPO's critic minimises.

    Args:
        values: [N] with gradient: the critic's before each token.
    """
    tokens, values = batch.loss_tokens(), values[batch.loss_mask]
    assert tokens.old_values is not None and tokens.returns is not None
    assert algorithm.critic is not None
    clip = algorithm.critic.clip
    loss = (tokens.loss_weights * value_loss(values, tokens.old_values, tokens.returns, clip)).sum()
    moved = (values - tokens.old_values).detach().abs()
    outside = moved > clip if clip is not None else torch.zeros_like(moved)
    return loss, {
        "loss/value": Metric(loss.detach()),
        "value/mean": _token_mean(values, denominators),
        "value/return_mean": _token_mean(tokens.returns, denominators),
        "value/squared_error": _token_mean((values - tokens.returns) ** 2, denominators),
        "value/clip_fraction": _token_mean(outside.to(values.dtype), denominators),
    }


OBJECTIVES: dict[str, Objective] = {
    "policy": policy_objective,
    "sft": sft_objective,
    "preference": preference_objective,
    "kto": kto_objective,
    "reward_model": reward_model_objective,
}
"""A row's ``objective`` -> function. value_objective is the critic's, beside the policy's."""


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


def _mean(values: torch.Tensor, count: int) -> Metric:
    """This micro-batch's share of a mean over ``count`` values of the whole batch."""
    return Metric(values.detach().sum() / max(1, count))


def _token_mean(values: torch.Tensor, denominators: Denominators) -> Metric:
    return _mean(values, denominators.num_tokens)


def _largest(values: torch.Tensor) -> Metric:
    """Maximum of values >= 0, 0 for none."""
    return Metric(torch.cat([values, values.new_zeros(1)]).max(), "max", "max")


def _ratio_metrics(
    ratio: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    block: PolicyLossBlock,
    denominators: Denominators,
) -> Metrics:
    """How far the policy is from the ratio's denominator, and how often the clip holds it."""
    metrics = {
        "ratio/mean": _token_mean(ratio, denominators),
        "ratio/value_max": _largest(ratio),
        "kl/old": _token_mean(k3(torch.zeros_like(log_ratio), log_ratio), denominators),
    }
    if not isinstance(block, ClipBlock | CISPOBlock):
        return metrics
    low, high = ratio < 1.0 - block.clip_low, ratio > 1.0 + block.clip_high
    if isinstance(block, ClipBlock):
        # The pessimistic bound holds only where it lowers the objective.
        low, high = low & (advantages < 0), high & (advantages > 0)
    metrics["clip/low_fraction"] = _token_mean(low.to(ratio.dtype), denominators)
    metrics["clip/high_fraction"] = _token_mean(high.to(ratio.dtype), denominators)
    if isinstance(block, ClipBlock) and block.dual_clip is not None:
        dual = (ratio > block.dual_clip) & (advantages < 0)
        metrics["clip/dual_fraction"] = _token_mean(dual.to(ratio.dtype), denominators)
    return metrics


def _mismatch_metrics(trainer: torch.Tensor, engine: torch.Tensor, denominators: Denominators) -> Metrics:
    """Engine against trainer: k1 of KL(engine || trainer) at the engine's samples, and absolute differences.

    With the trainer's logprobs of before the first update, or at the first update, this is the two implementations'
    disagreement (and staleness); at later updates of a batch without them, the policy's own movement is in it. A step
    reports the first update's.
    """
    difference = (engine - trainer).abs()
    metrics = {
        "mismatch/kl": _token_mean(engine - trainer, denominators),
        "mismatch/logprob_abs_diff": _token_mean(difference, denominators),
        "mismatch/logprob_abs_diff_max": _largest(difference),
    }
    return {name: metric._replace(over_updates="first") for name, metric in metrics.items()}


def _pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor, denominators: Denominators) -> Metrics:
    """Of rewards [B]."""
    return {
        "preference/chosen_reward": _mean(chosen, denominators.num_groups),
        "preference/rejected_reward": _mean(rejected, denominators.num_groups),
        "preference/margin": _mean(chosen - rejected, denominators.num_groups),
        "preference/accuracy": _mean((chosen > rejected).to(chosen.dtype), denominators.num_groups),
    }
