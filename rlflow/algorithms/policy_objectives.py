"""The objectives of online algorithms: the policy's and the critic's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlflow.algorithms import corrections, policy_losses
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.distillation import teacher_advantages
from rlflow.algorithms.kl import KL_ESTIMATORS, k1, k3, unbiased
from rlflow.algorithms.objective_parts import Metrics, largest, token_mean
from rlflow.algorithms.own_losses import own_policy_loss
from rlflow.algorithms.value_losses import value_loss
from rlflow.metrics import Metric
from rlflow.recipe import OnlineBlock
from rlflow.recipe.algorithm_blocks import BoundedWeightBlock
from rlflow.recipe.distill_blocks import AdvantageDistillBlock, Distill, DivergenceDistillBlock
from rlflow.recipe.policy_loss_blocks import (
    CISPOBlock,
    ClipBlock,
    ClipCovBlock,
    DPPOBlock,
    GMPOBlock,
    KLCovBlock,
    OwnLossBlock,
    PolicyLossBlock,
    SAPOBlock,
)
from rlflow.types import Denominators


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a policy loss is made of: N loss tokens of S sequences."""

    ratio: torch.Tensor
    """[N], with gradient, as ``loss.ratio`` says."""
    log_ratio: torch.Tensor
    """[N], with gradient: of the token."""
    logprobs: torch.Tensor
    """[N], with gradient."""
    advantages: torch.Tensor
    """[N]."""
    sequence_ids: torch.Tensor
    """int64 [N]."""
    num_sequences: int
    selected: torch.Tensor | None
    """float [N]: 1 at the tokens that the loss treats apart."""

    @property
    def chosen(self) -> torch.Tensor:
        """bool [N]: those that the loss treats apart."""
        assert self.selected is not None, "the loss treats some tokens apart: the samples must say which"
        return self.selected > 0


Fractions = dict[str, torch.Tensor]
"""Name of a metric -> bool [N]: the tokens that it is the share of."""


def _clip(t: PolicyTokens, b: ClipBlock) -> tuple[torch.Tensor, Fractions]:
    held = _held(t.ratio, 1.0 - b.clip_low, 1.0 + b.clip_high, t.advantages)
    if b.dual_clip is not None:
        held["clip/dual_fraction"] = (t.ratio > b.dual_clip) & (t.advantages < 0)
    return policy_losses.clip_loss(t.ratio, t.advantages, b.clip_low, b.clip_high, b.dual_clip), held


def _cispo(t: PolicyTokens, b: CISPOBlock) -> tuple[torch.Tensor, Fractions]:
    loss = policy_losses.cispo_loss(t.ratio, t.logprobs, t.advantages, b.clip_low, b.clip_high)
    return loss, {"clip/low_fraction": t.ratio < 1.0 - b.clip_low, "clip/high_fraction": t.ratio > 1.0 + b.clip_high}


def _sapo(t: PolicyTokens, b: SAPOBlock) -> tuple[torch.Tensor, Fractions]:
    return policy_losses.sapo_loss(t.ratio, t.advantages, b.tau_positive, b.tau_negative), {}


def _gmpo(t: PolicyTokens, b: GMPOBlock) -> tuple[torch.Tensor, Fractions]:
    loss = policy_losses.gmpo_loss(t.log_ratio, t.advantages, t.sequence_ids, t.num_sequences, b.clip_low, b.clip_high)
    return loss, _held(t.log_ratio, -b.clip_low, b.clip_high, t.advantages)


def _dppo(t: PolicyTokens, b: DPPOBlock) -> tuple[torch.Tensor, Fractions]:
    old = t.logprobs.detach() - t.log_ratio.detach()
    outside = policy_losses.leaves_trust_region(b.divergence, t.logprobs, old, t.advantages, b.bound_low, b.bound_high)
    loss = policy_losses.dppo_loss(t.ratio, t.logprobs, t.advantages, outside, b.max_weight)
    return loss, {
        "clip/low_fraction": outside & (t.advantages <= 0),
        "clip/high_fraction": outside & (t.advantages > 0),
    }


def _clip_cov(t: PolicyTokens, b: ClipCovBlock) -> tuple[torch.Tensor, Fractions]:
    loss = policy_losses.clip_cov_loss(t.ratio, t.advantages, t.chosen, b.clip_low, b.clip_high)
    held = _held(t.ratio, 1.0 - b.clip_low, 1.0 + b.clip_high, t.advantages)
    return loss, {**held, "clip/selected_fraction": t.chosen}


def _kl_cov(t: PolicyTokens, b: KLCovBlock) -> tuple[torch.Tensor, Fractions]:
    loss = policy_losses.kl_cov_loss(t.ratio, t.log_ratio, t.advantages, t.chosen, b.coef)
    return loss, {"clip/selected_fraction": t.chosen}


def _held(values: torch.Tensor, low: float, high: float, advantages: torch.Tensor) -> Fractions:
    """Where a pessimistic bound holds: only where it lowers the objective."""
    return {
        "clip/low_fraction": (values < low) & (advantages < 0),
        "clip/high_fraction": (values > high) & (advantages > 0),
    }


POLICY_LOSSES: dict[str, Callable[[PolicyTokens, Any], tuple[torch.Tensor, Fractions]]] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "gmpo": _gmpo,
    "dppo": _dppo,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}
"""``loss.kind`` -> function of the tokens and the kind's block, to a loss [N] and what its clip does to which."""


def policy_objective(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: OnlineBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """The loss of rollouts, and of demonstrations where the algorithm mixes them in: those of label 1.

    A demonstration's is sum over loss tokens of weight * -phi log pi, phi = sg[p (1 - p)] or 1
    (CHORD, arXiv 2508.11408).

    Args:
        logprobs, entropies: [N] under the current policy, the first with gradient.
    """
    if algorithm.mixture is None:
        return _of_rollouts(logprobs, entropies, batch, algorithm, denominators)
    is_shown = batch.loss_mask & (batch.labels > 0)[batch.sequence_ids]
    rollouts = replace(batch, loss_mask=batch.loss_mask & ~is_shown)
    loss, metrics = _of_rollouts(logprobs, entropies, rollouts, algorithm, denominators)
    taught = policy_losses.demonstration_loss(logprobs[is_shown], weighs_by_certainty=algorithm.mixture.phi)
    of_shown = (batch.loss_weights[is_shown] * taught).sum()
    total = loss + of_shown
    return total, metrics | {"loss/sft": Metric(of_shown.detach()), "loss/total": Metric(total.detach())}


def _of_rollouts(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: OnlineBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """sum over loss tokens of weight * (policy loss * correction + kl.coef * KL - entropy_coef * entropy), and with a
    divergence from a teacher distill.coef times that.

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
    advantages = _with_teacher(tokens.advantages, tokens, proximal, algorithm.distill)
    tokens = replace(tokens, advantages=advantages)
    denominator = proximal if correction.old_policy == "trainer" else engine
    assert denominator is not None, "old_policy: engine needs the engine's logprobs"
    policy_loss, metrics = _policy_loss(tokens, logprobs, denominator, block, denominators)
    if engine is not None:
        metrics |= _mismatch_metrics(proximal, engine, denominators)
    if isinstance(correction, BoundedWeightBlock):
        assert engine is not None, "a correction needs the engine's logprobs"
        factors, of_correction = _correction(proximal, engine, tokens, correction, denominators)
        policy_loss, metrics = policy_loss * factors, metrics | of_correction

    loss = (tokens.loss_weights * policy_loss).sum()
    metrics["loss/policy"] = Metric(loss.detach())
    of_teacher, of_metrics = _teacher_loss(logprobs, tokens, algorithm.distill, denominators)
    loss, metrics = loss + of_teacher, metrics | of_metrics
    if tokens.ref_logprobs is not None:
        estimate = KL_ESTIMATORS[kl.estimator](logprobs, tokens.ref_logprobs)
        metrics["kl/ref"] = token_mean(estimate, denominators)
        if kl.placement == "loss" and kl.coef:
            weighted = unbiased(estimate, logprobs - denominator) if kl.unbiased_gradient else estimate
            loss = loss + kl.coef * (tokens.loss_weights * weighted).sum()
    if entropies is not None:
        entropies = entropies[batch.loss_mask]
        metrics["entropy"] = token_mean(entropies, denominators)
        if block.entropy_coef:
            loss = loss - block.entropy_coef * (tokens.loss_weights * entropies).sum()
    metrics["loss/total"] = Metric(loss.detach())
    return loss, metrics


def _policy_loss(
    tokens: TensorBatch,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    block: PolicyLossBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """The loss of every loss token [N] before any correction, how far its ratio is from 1, and whom the clip holds.

    Args:
        old_logprobs: [N], of the ratio's denominator.
    """
    assert tokens.advantages is not None
    log_ratio = logprobs - old_logprobs
    ratio = policy_losses.RATIOS[block.ratio](log_ratio, tokens.sequence_ids, tokens.num_sequences)
    moved = log_ratio.detach()
    metrics = {
        "ratio/mean": token_mean(ratio, denominators),
        "ratio/value_max": largest(ratio.detach()),
        "kl/old": token_mean(k3(torch.zeros_like(moved), moved), denominators),
    }
    if isinstance(block, OwnLossBlock):
        return own_policy_loss(block, tokens, ratio=ratio, logprobs=logprobs, old_logprobs=old_logprobs), metrics
    ids, number = tokens.sequence_ids, tokens.num_sequences
    of_policy = PolicyTokens(ratio, log_ratio, logprobs, tokens.advantages, ids, number, tokens.selected)
    loss, fractions = POLICY_LOSSES[block.kind](of_policy, block)
    return loss, metrics | {name: token_mean(x.to(ratio.dtype), denominators) for name, x in fractions.items()}


def _correction(
    proximal: torch.Tensor,
    engine: torch.Tensor,
    tokens: TensorBatch,
    block: BoundedWeightBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, Metrics]:
    """What corrects the policy loss of each token for the difference between engine and trainer, [N]."""
    weights = corrections.mismatch_weights(proximal, engine, tokens.sequence_ids, tokens.num_sequences, block.level)
    factors = corrections.CORRECTIONS[block.mode](weights, block.low, block.high)
    outside = corrections.is_out_of_bounds(weights, block.low, block.high)
    return factors, {
        "correction/weight_mean": token_mean(factors, denominators),
        "correction/bounded_fraction": token_mean(outside.to(factors.dtype), denominators),
    }


def _with_teacher(
    advantages: torch.Tensor, tokens: TensorBatch, proximal: torch.Tensor, distill: Distill
) -> torch.Tensor:
    """Advantages [N] with what a teacher adds to them; ``proximal``: logprobs of before the update."""
    if not isinstance(distill, AdvantageDistillBlock):
        return advantages
    assert tokens.teacher_logprobs is not None, "distill.kind advantage needs the teacher's logprobs"
    return advantages + teacher_advantages(proximal, tokens.teacher_logprobs, distill.coef)


def _teacher_loss(
    logprobs: torch.Tensor, tokens: TensorBatch, distill: Distill, denominators: Denominators
) -> tuple[torch.Tensor | float, Metrics]:
    """What a divergence from a teacher adds to the loss, and how far the policy is from it."""
    metrics: Metrics = {}
    if tokens.teacher_logprobs is not None:
        metrics["kl/teacher"] = token_mean(k1(logprobs, tokens.teacher_logprobs), denominators)
    if not isinstance(distill, DivergenceDistillBlock):
        return 0.0, metrics
    assert tokens.divergences is not None, "distill.kind divergence needs the divergences of the tokens"
    metrics["distill/divergence"] = token_mean(tokens.divergences, denominators)
    return distill.coef * (tokens.loss_weights * tokens.divergences).sum(), metrics


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
