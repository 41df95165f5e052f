"""Losses of a query's documents, from the score that each has together with the query."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.classification import sequence_weights
from rlflow.metrics import Metric
from rlflow.recipe import RerankerBlock
from rlflow.recipe.sequence_blocks import ListwiseBlock
from rlflow.types import Denominators


def reranking_objective(
    scores: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: RerankerBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Pointwise the mean over documents; otherwise the mean over queries of the means of their comparisons.

    Args:
        scores: [S] with gradient; of the whole batch where documents are compared.
        batch: Its labels are what each document is worth to its query.
    """
    block = algorithm.reranking
    if block.loss == "pointwise":
        weights = sequence_weights(batch)
        loss = (weights * pointwise(scores, batch.labels)).sum()
        right = ((scores > 0) == (batch.labels > 0.5)).to(scores.dtype)
        metrics = {"reranking/accuracy": Metric((weights * right).sum())}
    else:
        assert batch.groups is not None
        better = is_better(batch.labels, batch.groups)
        if isinstance(block, ListwiseBlock):
            losses, document = listwise(scores / block.temperature, better)
        else:
            losses, document = pairwise(scores, better)
        loss = _mean_of_rows(losses, batch.groups[document], denominators.num_groups)
        first, second = better.nonzero(as_tuple=True)
        right = (scores[first] > scores[second]).to(scores.dtype)
        accuracy = _mean_of_rows(right, batch.groups[first], denominators.num_groups)
        metrics = {"reranking/accuracy": Metric(accuracy)}
    return loss, {"loss/reranking": Metric(loss.detach())} | metrics


def pointwise(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s) (arXiv 1901.04085, eq. 1); both [S]."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def pairwise(scores: torch.Tensor, better: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log sigmoid(s_i - s_j) for each document i and each worse one j (RankNet, Burges et al. 2005, eq. 3).

    Args:
        scores: [S].
        better: bool [S, S]: i is better than j.

    Returns:
        [C] for each comparison, and its better document.
    """
    first, second = better.nonzero(as_tuple=True)
    return -F.logsigmoid(scores[first] - scores[second]), first


def listwise(scores: torch.Tensor, better: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log(exp(s_i) / (exp(s_i) + sum over worse documents j of exp(s_j))) for each document i that has worse ones:
    the cross-entropy of a positive among its query's negatives (arXiv 2101.08751, eq. 2).

    Args:
        scores: [S].
        better: bool [S, S].

    Returns:
        [C] for each such document, and which it is.
    """
    document = better.any(dim=1).nonzero().squeeze(1)
    is_own = F.one_hot(document, len(scores)).bool()
    candidates = scores.expand(len(document), -1).masked_fill(~(better[document] | is_own), -torch.inf)
    return F.cross_entropy(candidates, document, reduction="none"), document


def is_better(labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """bool [S, S]: i and j are of one query, and i is worth more."""
    return (groups[:, None] == groups) & (labels[:, None] > labels)


def _mean_of_rows(values: torch.Tensor, groups: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The mean over rows of the means of their values [C]."""
    _, row, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return (values / counts[row].to(values.dtype)).sum() / max(1, num_rows)
