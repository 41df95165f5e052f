"""Losses of classified texts: one number a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rlflow.algorithms.batch import TensorBatch, segment_sum
from rlflow.metrics import Metric
from rlflow.recipe import ClassificationBlock
from rlflow.types import Denominators


def single_label(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(z)_c (arXiv 1810.04805, section 4.1).

    Args:
        outputs: [S, K], z.
        targets: [S, 1], the class c of each.
    """
    return F.cross_entropy(outputs, targets[:, 0].long(), reduction="none")


def multi_label(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the classes k of -t_k log sigmoid(z_k) - (1 - t_k) log sigmoid(-z_k).

    Args:
        outputs, targets: [S, K], z and t.
    """
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)


def regression(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the numbers k of (z_k - t_k)^2; outputs, targets: [S, K]."""
    return ((outputs - targets) ** 2).mean(dim=1)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "single_label": single_label,
    "multi_label": multi_label,
    "regression": regression,
}
"""``classification.problem`` -> function of outputs [S, K] and targets -> [S]."""


def classification_objective(
    outputs: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: ClassificationBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Sum over sequences of weight * loss: the batch's mean. transformers' classifiers have the same.

    Args:
        outputs: [S, K] with gradient, of each sequence's last token.
    """
    assert batch.targets is not None, "classified texts have targets"
    problem = algorithm.classification.problem
    weights = sequence_weights(batch)
    loss = (weights * LOSSES[problem](outputs, batch.targets)).sum()
    metrics = {"loss/classification": Metric(loss.detach())}
    if problem != "regression":
        metrics["classification/accuracy"] = Metric((weights * is_right(outputs, batch.targets, problem)).sum())
    return loss, metrics


def is_right(outputs: torch.Tensor, targets: torch.Tensor, problem: str) -> torch.Tensor:
    """float [S]: whether the class, or all of the classes, of each sequence is chosen."""
    if problem == "single_label":
        return (outputs.argmax(dim=1) == targets[:, 0]).to(outputs.dtype)
    return ((outputs > 0) == (targets > 0.5)).all(dim=1).to(outputs.dtype)


def sequence_weights(batch: TensorBatch) -> torch.Tensor:
    """float [S]: each sequence's share of the batch's mean; 0 for filler."""
    return segment_sum(batch.loss_weights, batch.sequence_ids, batch.num_sequences)
