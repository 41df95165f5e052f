"""Losses of related texts. They compare embeddings of a whole batch, wherever these were computed.

Sequences stand in the order of the batch, those of a row next to each other: its first is the anchor (a query), the
others are documents. Similarity is the cosine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlflow.algorithms.batch import TensorBatch
from rlflow.metrics import Metric
from rlflow.recipe import EmbeddingBlock
from rlflow.recipe.sequence_blocks import ContrastiveBlock, EmbeddingLoss, InfoNCEBlock
from rlflow.types import Denominators


def embedding_objective(
    embeddings: torch.Tensor,
    entropies: torch.Tensor | None,
    batch: TensorBatch,
    algorithm: EmbeddingBlock,
    denominators: Denominators,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The loss of a whole batch, and with Matryoshka lengths the sum of those of embeddings that are cut to them
    (arXiv 2205.13147, eq. 1, all weights 1).

    Args:
        embeddings: [S, D] with gradient, of all sequences of the batch.
    """
    block = algorithm.embedding
    loss, metrics = _loss(embeddings, batch, block)
    for length in block.matryoshka_dims:
        loss = loss + _loss(embeddings[:, :length], batch, block)[0]
    return loss, {"loss/embedding": Metric(loss.detach())} | metrics


def _loss(embeddings: torch.Tensor, batch: TensorBatch, block: EmbeddingLoss) -> tuple[torch.Tensor, dict[str, Metric]]:
    assert batch.groups is not None and batch.texts is not None
    unit, is_anchor = F.normalize(embeddings, dim=-1), anchors_in(batch.groups)
    if not isinstance(block, InfoNCEBlock):
        similarities = (unit[is_anchor] * unit[~is_anchor]).sum(dim=1)
        scores = batch.labels[is_anchor]
        related = similarities.detach()[scores > 0.5]
        metrics = {"embedding/positive_similarity": Metric(related.mean())} if len(related) else {}
        return _pair_loss(similarities, scores, block), metrics
    similarities = unit[is_anchor] @ unit[~is_anchor].T
    own, positive = documents_of(batch.groups, batch.labels)
    allowed = ~known_related(positive, batch.texts[is_anchor], batch.texts[~is_anchor])
    if not block.in_batch_negatives:
        allowed &= own
    losses, row = infonce(similarities / block.temperature, positive, allowed)
    rows, nearest = int(is_anchor.sum()), _is_nearest(similarities.detach(), positive, allowed)
    weights = (1.0 / positive.sum(dim=1).to(losses.dtype) / rows)[row]
    metrics = {
        "embedding/accuracy": Metric((weights * nearest).sum()),
        "embedding/positive_similarity": Metric((weights * similarities.detach()[positive]).sum()),
    }
    return (weights * losses).sum(), metrics


def infonce(logits: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log(exp(z_ap) / (exp(z_ap) + sum over negatives n of exp(z_an))), z = similarity / temperature
    (arXiv 1807.03748, eq. 4; with the negatives of the batch arXiv 1705.00652, section 4.4).

    Args:
        logits: [A, N], z of each anchor with each document.
        positive: bool [A, N]: pairs that are related; each is compared alone with the negatives.
        allowed: bool [A, N]: the negatives.

    Returns:
        [P] for each positive pair, and its anchor.
    """
    anchor, document = positive.nonzero(as_tuple=True)
    is_own = F.one_hot(document, logits.shape[1]).bool()
    candidates = logits[anchor].masked_fill(~(allowed[anchor] | is_own), -torch.inf)
    return F.cross_entropy(candidates, document, reduction="none"), anchor


def cosine_similarity(similarities: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean of (cos(a, b) - score)^2 (arXiv 1908.10084, section 3); both [B]."""
    return ((similarities - scores) ** 2).mean()


def contrastive(similarities: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of y d^2 / 2 + (1 - y) max(0, margin - d)^2 / 2, d = 1 - cos(a, b) (Hadsell et al. 2006, eq. 4).

    Args:
        similarities: [B].
        labels: [B], y: 1 related, 0 not.
    """
    distances = 1.0 - similarities
    apart = torch.relu(margin - distances)
    return (0.5 * (labels * distances**2 + (1.0 - labels) * apart**2)).mean()


def online_contrastive(similarities: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
    """Sum of d^2 over related pairs that are farther apart than the nearest unrelated one, and of
    max(0, margin - d)^2 over unrelated pairs that are nearer than the farthest related one: sentence-transformers'
    OnlineContrastiveLoss. Of one pair of a kind, the other kind's mean is the bound."""
    distances = 1.0 - similarities
    related, unrelated = distances[labels > 0.5], distances[labels <= 0.5]
    bound = related.max() if len(related) > 1 else unrelated.mean()
    hard = torch.relu(margin - unrelated[unrelated < bound])
    bound = unrelated.min() if len(unrelated) > 1 else related.mean()
    return (related[related > bound] ** 2).sum() + (hard**2).sum()


def anchors_in(groups: torch.Tensor) -> torch.Tensor:
    """bool [S]: the first sequence of each row."""
    first = torch.ones_like(groups, dtype=torch.bool)
    first[1:] = groups[1:] != groups[:-1]
    return first


def documents_of(groups: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [A, N]: which documents are of each anchor's row, and which of them are related to it."""
    is_anchor = anchors_in(groups)
    own = groups[is_anchor][:, None] == groups[~is_anchor]
    return own, own & (labels[~is_anchor] > 0)


def known_related(positive: torch.Tensor, of_anchors: torch.Tensor, of_documents: torch.Tensor) -> torch.Tensor:
    """bool [A, N]: documents that are no negatives of an anchor: they have the text of a document that is related to it
    or to another anchor of the same text, or its own text.

    Args:
        positive: bool [A, N].
        of_anchors, of_documents: [A] and [N], numbers that are equal where texts are.
    """
    same_anchor = (of_anchors[:, None] == of_anchors).float()
    same_document = (of_documents[:, None] == of_documents).float()
    related = same_anchor @ positive.float() @ same_document > 0
    return related | (of_anchors[:, None] == of_documents)


def _is_nearest(similarities: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """float [P]: whether no negative is as near to the anchor as its positive."""
    anchor, document = positive.nonzero(as_tuple=True)
    best = similarities.masked_fill(~allowed, -torch.inf).amax(dim=1)
    return (similarities[anchor, document] > best[anchor]).to(similarities.dtype)


def _pair_loss(similarities: torch.Tensor, scores: torch.Tensor, block: EmbeddingLoss) -> torch.Tensor:
    if not isinstance(block, ContrastiveBlock):
        return cosine_similarity(similarities, scores)
    function = contrastive if block.loss == "contrastive" else online_contrastive
    return function(similarities, scores, block.margin)
