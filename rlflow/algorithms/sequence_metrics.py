"""What is measured of held-out sequences from a model's outputs. numpy, on the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlflow.recipe import AlgorithmBlock, ClassificationBlock, EmbeddingBlock
from rlflow.recipe.sequence_blocks import ClassesBlock, InfoNCEBlock
from rlflow.types import Sample

CUTOFF = 10
"""Documents that ndcg@10 and recall@10 look at."""
_CHUNK = 512
"""Queries whose similarities with all documents are held at a time."""


def held_out_metrics(
    samples: Sequence[Sample], outputs: Sequence[np.ndarray], algorithm: AlgorithmBlock
) -> dict[str, float]:
    """The metrics of the algorithm's row; none where it has none of its own.

    Args:
        samples: Of whole rows, in the order of a batch.
        outputs: Of each, a number or [D].
    """
    name = algorithm.learning.held_out
    return HELD_OUT[name](samples, np.stack(outputs), algorithm) if name else {}


def classification_metrics(
    samples: Sequence[Sample], outputs: np.ndarray, algorithm: AlgorithmBlock
) -> dict[str, float]:
    """Accuracy, and F1 of each class and their mean (macro); of numbers Pearson's and Spearman's correlation.

    Of several numbers a text it is the mean over them: taken together, those of unlike sizes would correlate whatever
    is said.
    """
    assert isinstance(algorithm, ClassificationBlock)
    targets = np.stack([sample.targets for sample in samples if sample.targets is not None])
    problem = algorithm.classification
    if not isinstance(problem, ClassesBlock):
        of_each = [
            _correlations("regression", outputs.reshape(targets.shape)[:, column], targets[:, column])
            for column in range(targets.shape[1])
        ]
        return {name: float(np.mean([one[name] for one in of_each])) for name in of_each[0]}
    labels = problem.labels or []
    if problem.problem == "single_label":
        chosen = outputs.argmax(axis=1)[:, None] == np.arange(len(labels))
        true = targets[:, :1] == np.arange(len(labels))
    else:
        chosen, true = outputs > 0, targets > 0.5
    of_each = f1_scores(chosen, true)
    return {
        "classification/accuracy": float((chosen == true).all(axis=1).mean()),
        "classification/f1_macro": float(of_each.mean()),
        **{f"classification/f1/{label}": float(score) for label, score in zip(labels, of_each, strict=True)},
    }


def embedding_metrics(samples: Sequence[Sample], outputs: np.ndarray, algorithm: AlgorithmBlock) -> dict[str, float]:
    """Of related texts: each anchor looks for its positives among the documents of all rows. Of scored pairs: the
    correlation of cosine similarity and score (STS)."""
    assert isinstance(algorithm, EmbeddingBlock)
    groups = np.array([sample.group for sample in samples])
    labels = np.array([sample.label for sample in samples])
    is_anchor = np.append(True, groups[1:] != groups[:-1])
    unit = outputs / np.linalg.norm(outputs, axis=1, keepdims=True).clip(1e-12)
    if not isinstance(algorithm.embedding, InfoNCEBlock):
        similarities = (unit[is_anchor] * unit[~is_anchor]).sum(axis=1)
        return _correlations("sts", similarities, labels[is_anchor])
    texts = np.array([sample.text for sample in samples])
    # A document that several rows have is one, which any of them may find.
    documents, of_document = np.unique(texts[~is_anchor], return_inverse=True)
    first = np.unique(of_document, return_index=True)[1]
    corpus = unit[~is_anchor][first]
    row_of = np.cumsum(is_anchor) - 1
    positive = np.zeros((int(is_anchor.sum()), len(documents)), dtype=bool)
    related = labels[~is_anchor] > 0
    positive[row_of[~is_anchor][related], of_document[related]] = True
    anchors = unit[is_anchor]
    scores = [rank_metrics(anchors[part] @ corpus.T, positive[part]) for part in _chunks(len(anchors))]
    return _means("retrieval", scores)


def reranking_metrics(samples: Sequence[Sample], outputs: np.ndarray, algorithm: AlgorithmBlock) -> dict[str, float]:
    """How high the better documents of each query stand among its own; rows of one document are ranked nowhere."""
    groups = np.array([sample.group for sample in samples])
    labels = np.array([sample.label for sample in samples])
    scores = []
    for group in np.unique(groups):
        own = groups == group
        if len(np.unique(labels[own])) > 1:
            better = labels[own] > labels[own].min()
            scores.append(rank_metrics(outputs[own][None], better[None], labels[own][None]))
    return _means("reranking", scores)


HELD_OUT: dict[str, Callable[[Sequence[Sample], np.ndarray, AlgorithmBlock], dict[str, float]]] = {
    "classification": classification_metrics,
    "embedding": embedding_metrics,
    "reranking": reranking_metrics,
}
"""A row's ``held_out`` -> function of samples, their outputs [S] or [S, D] and the algorithm."""


def f1_scores(chosen: np.ndarray, true: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of each class, float [K]; 0 of a class that is neither chosen nor there.

    Args:
        chosen, true: bool [S, K].
    """
    hits = (chosen & true).sum(axis=0)
    return 2 * hits / np.maximum(1, chosen.sum(axis=0) + true.sum(axis=0))


def rank_metrics(scores: np.ndarray, relevant: np.ndarray, worth: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Of each query, float [Q]: ndcg@10, mrr (1 over the rank of the first relevant document), recall@1 and @10.

    A document that ties with others stands behind them: a model that tells nothing apart finds nothing.

    Args:
        scores: [Q, N].
        relevant: bool [Q, N].
        worth: [Q, N], the gain of each document (Jarvelin and Kekalainen 2002); 1 of relevant ones where absent.
    """
    gains = relevant.astype(float) if worth is None else worth
    # Among equals the worst first.
    order = np.lexsort((gains, -scores), axis=1)
    ranked, found = (np.take_along_axis(each, order, axis=1) for each in (gains, relevant))
    discounts = 1.0 / np.log2(np.arange(2, min(CUTOFF, scores.shape[1]) + 2))
    size = len(discounts)
    best = -np.sort(-gains, axis=1)[:, :size] @ discounts
    count = np.maximum(1, relevant.sum(axis=1))
    return {
        "ndcg@10": ranked[:, :size] @ discounts / np.where(best > 0, best, 1.0),
        "mrr": np.where(found.any(axis=1), 1.0 / (found.argmax(axis=1) + 1), 0.0),
        "recall@1": found[:, :1].sum(axis=1) / count,
        "recall@10": found[:, :CUTOFF].sum(axis=1) / count,
    }


def pearson(values: np.ndarray, others: np.ndarray) -> float:
    """NaN where one of them does not vary."""
    values, others = (each.astype(np.float64) - each.mean(dtype=np.float64) for each in (values, others))
    norm = np.sqrt((values**2).sum() * (others**2).sum())
    return float((values * others).sum() / norm) if norm > 0 else float("nan")


def spearman(values: np.ndarray, others: np.ndarray) -> float:
    """Pearson's correlation of ranks; equals share the mean of theirs."""
    return pearson(_ranks(values), _ranks(others))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _correlations(prefix: str, values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    return {f"{prefix}/pearson": pearson(values, others), f"{prefix}/spearman": spearman(values, others)}


def _means(prefix: str, scores: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    names = scores[0] if scores else {}
    return {f"{prefix}/{name}": float(np.concatenate([one[name] for one in scores]).mean()) for name in names}


def _chunks(size: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, size, _CHUNK)]
