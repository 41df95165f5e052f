"""The words of the recipe bound to functions: a micro-batch to its share of the loss and of the metrics.

Every objective has the same arguments: what the model computed, the batch, the algorithm block and the denominators of
the optimizer batch. A metric is a sum divided by one of these denominators, so that adding over micro-batches and ranks
gives the batch's mean, or a maximum.
"""

from __future__ import annotations

import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.classification import classification_objective
from rlflow.algorithms.embedding import embedding_objective
from rlflow.algorithms.objective_parts import Metrics, Objective, token_mean
from rlflow.algorithms.policy_objectives import policy_objective
from rlflow.algorithms.preference_objectives import kto_objective, preference_objective, reward_model_objective
from rlflow.algorithms.reranking import reranking_objective
from rlflow.metrics import Metric
from rlflow.recipe import AlgorithmBlock
from rlflow.recipe.presets import ALGORITHMS
from rlflow.types import Denominators


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
        metrics["entropy"] = token_mean(entropies[mask], denominators)
    return loss, metrics


OBJECTIVES: dict[str, Objective] = {
    "policy": policy_objective,
    "sft": sft_objective,
    "preference": preference_objective,
    "kto": kto_objective,
    "reward_model": reward_model_objective,
    "classification": classification_objective,
    "embedding": embedding_objective,
    "reranking": reranking_objective,
    "yes_no": reranking_objective,
}
"""A row's ``objective`` -> function. value_objective is the critic's, beside the policy's."""


def objective_of(algorithm: AlgorithmBlock) -> Objective:
    """The objective of the algorithm's row."""
    return OBJECTIVES[ALGORITHMS[algorithm.name].objective]
