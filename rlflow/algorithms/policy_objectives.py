"""The objectives of online algorithms: the policy's and the critic's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlflow.algorithms import corrections, policy_losses
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.kl import KL_ESTIMATORS, k3, unbiased
from rlflow.algorithms.objective_parts import Metrics, largest, token_mean
from rlflow.algorithms.own_losses import own_policy_loss
from rlflow.algorithms.value_losses import value_loss
from rlflow.metrics import Metric
from rlflow.recipe import OnlineBlock
from rlflow.recipe.algorithm_blocks import BoundedWeightBlock
from rlflow.recipe.policy_loss_blocks import CISPOBlock, ClipBlock, OwnLossBlock, PolicyLossBlock
from rlflow.types import Denominators

POLICY_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]] = {
    "clip": lambda ratio, _, adv, b: policy_losses.clip_loss(ratio, adv, b.clip_low, b.clip_high, b.dual_clip),
    "cispo": lambda ratio, logprobs, adv, b: policy_losses.cispo_loss(ratio, logprobs, adv, b.clip_low, b.clip_high),
    "sapo": lambda ratio, _, adv, b: policy_losses.sapo_loss(ratio, adv, b.tau_positive, b.tau_negative),
}
"""``loss.kind`` -> function of ratio, logprobs, advantages [N] and the numbers of the kind's block."""


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
        metrics["correction/weight_mean"] = token_mean(factors, denominators)
        metrics["correction/bounded_fraction"] = token_mean(outside.to(ratio.dtype), denominators)

    loss = (tokens.loss_weights * policy_loss).sum()
    metrics["loss/policy"] = Metric(loss.detach())
    if tokens.ref_logprobs is not None:
        estimate = KL_ESTIMATORS[kl.estimator](logprobs, tokens.ref_logprobs)
        metrics["kl/ref"] = token_mean(estimate, denominators)
        if kl.placement == "loss" and kl.coef:
            weighted = unbiased(estimate, log_ratio) if kl.unbiased_gradient else estimate
            loss = loss + kl.coef * (tokens.loss_weights * weighted).sum()
    if entropies is not None:
        entropies = entropies[batch.loss_mask]
        metrics["entropy"] = token_mean(entropies, denominators)
        if block.entropy_coef:
            loss = loss - block.entropy_coef * (tokens.loss_weights * entropies).sum()
    metrics["loss/total"] = Metric(loss.detach())
    return loss, metrics


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
        "value/mean": token_mean(values, denominators),
        "value/return_mean": token_mean(tokens.returns, denominators),
        "value/squared_error": token_mean((values - tokens.returns) ** 2, denominators),
        "value/clip_fraction": token_mean(outside.to(values.dtype), denominators),
    }


def _ratio_metrics(
    ratio: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    block: PolicyLossBlock,
    denominators: Denominators,
) -> Metrics:
    """How far the policy is from the ratio's denominator, and how often the clip holds it."""
    metrics = {
        "ratio/mean": token_mean(ratio, denominators),
        "ratio/value_max": largest(ratio),
        "kl/old": token_mean(k3(torch.zeros_like(log_ratio), log_ratio), denominators),
    }
    if not isinstance(block, ClipBlock | CISPOBlock):
        return metrics
    low, high = ratio < 1.0 - block.clip_low, ratio > 1.0 + block.clip_high
    if isinstance(block, ClipBlock):
        # The pessimistic bound holds only where it lowers the objective.
        low, high = low & (advantages < 0), high & (advantages > 0)
    metrics["clip/low_fraction"] = token_mean(low.to(ratio.dtype), denominators)
    metrics["clip/high_fraction"] = token_mean(high.to(ratio.dtype), denominators)
    if isinstance(block, ClipBlock) and block.dual_clip is not None:
        dual = (ratio > block.dual_clip) & (advantages < 0)
        metrics["clip/dual_fraction"] = token_mean(dual.to(ratio.dtype), denominators)
    return metrics


def _mismatch_metrics(trainer: torch.Tensor, engine: torch.Tensor, denominators: Denominators) -> Metrics:
    """Engine against trainer: k1 of KL(engine || trainer) at the engine's samples, and absolute differences.

    With the trainer's logprobs of before the first update, or at the first update, this is the two implementations'
    disagreement (and staleness); at later updates of a batch without them, the policy's own movement is in it. A step
    reports the first update's.
    """
    difference = (engine - trainer).abs()
    metrics = {
        "mismatch/kl": token_mean(engine - trainer, denominators),
        "mismatch/logprob_abs_diff": token_mean(difference, denominators),
        "mismatch/logprob_abs_diff_max": largest(difference),
    }
    return {name: metric._replace(over_updates="first") for name, metric in metrics.items()}
