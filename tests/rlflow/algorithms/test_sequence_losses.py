"""Losses and metrics of whole sequences against sentence-transformers, scikit-learn, scipy, and numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlflow.algorithms import embedding, reranking, sequence_metrics
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.embedding import embedding_objective
from rlflow.algorithms.reranking import reranking_objective
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators, Sample

ROWS, SIZE = 5, 8


def batch_of(labels: Any, groups: Any, texts: Any = None) -> TensorBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    count = len(groups)
    return TensorBatch(
        *(nothing, nothing, nothing.bool(), nothing.float(), nothing),
        labels=torch.tensor(labels, dtype=torch.float32),
        groups=torch.tensor(groups, dtype=torch.float32),
        texts=torch.arange(count).float() if texts is None else torch.tensor(texts).float(),
    )


def embeddings_of(count: int) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()


def loss_of(embeddings: torch.Tensor, batch: TensorBatch, **block: Any) -> torch.Tensor:
    rows = len(set(batch.groups.tolist())) if batch.groups is not None else 0
    denominators = Denominators(len(embeddings), len(embeddings), rows)
    return embedding_objective(embeddings, None, batch, algorithm_of("embedding", embedding=block), denominators)[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    """Values and gradients."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    mine, other = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
    assert other.abs().max() > 1e-3
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def oracle(name: str, **options: Any) -> Any:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    return getattr(losses, name)(None, **options).compute_loss_from_embeddings


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_infonce_is_the_ranking_loss_of_sentence_transformers(negatives: int):
    per_row = 2 + negatives
    leaf = embeddings_of(ROWS * per_row)
    batch = batch_of([0.0, 1.0, *[-1.0] * negatives] * ROWS, np.repeat(np.arange(ROWS), per_row))
    columns = [leaf[place::per_row] for place in range(per_row)]
    theirs = oracle("MultipleNegativesRankingLoss", scale=10.0)(columns, torch.zeros(ROWS))
    assert_same(loss_of(leaf, batch, temperature=0.1), theirs, leaf)


def test_matryoshka_is_the_sum_over_the_lengths():
    leaf, batch = embeddings_of(ROWS * 2), batch_of([0.0, 1.0] * ROWS, np.repeat(np.arange(ROWS), 2))
    of = oracle("MultipleNegativesRankingLoss", scale=20.0)
    theirs = sum(of([leaf[::2, :length], leaf[1::2, :length]], torch.zeros(ROWS)) for length in (SIZE, 4, 2))
    assert isinstance(theirs, torch.Tensor)
    assert_same(loss_of(leaf, batch, matryoshka_dims=[4, 2]), theirs, leaf)


@pytest.mark.parametrize(
    ("loss", "name", "options"),
    [
        ("cosine_similarity", "CosineSimilarityLoss", {}),
        ("contrastive", "ContrastiveLoss", {"margin": 0.7}),
        ("online_contrastive", "OnlineContrastiveLoss", {"margin": 0.7}),
    ],
)
def test_losses_of_scored_pairs_are_those_of_sentence_transformers(loss: str, name: str, options: dict[str, float]):
    leaf = embeddings_of(12)
    scores = [0.9, -0.3, 0.1, 0.5, 1.0, 0.0] if loss == "cosine_similarity" else [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    theirs = oracle(name, **options)([leaf[::2], leaf[1::2]], torch.tensor(scores))
    batch = batch_of(np.repeat(scores, 2), np.repeat(np.arange(6), 2))
    assert_same(loss_of(leaf, batch, loss=loss, **options), theirs, leaf)


def test_without_in_batch_negatives_a_row_sees_its_own_alone():
    leaf = embeddings_of(6)
    batch = batch_of([0.0, 1.0, -1.0] * 2, [0, 0, 0, 1, 1, 1])
    unit = torch.nn.functional.normalize(leaf, dim=1)
    margins = [unit[i] @ unit[i + 1] - unit[i] @ unit[i + 2] for i in (0, 3)]
    theirs = torch.stack([torch.nn.functional.softplus(-margin / 0.05) for margin in margins]).mean()
    assert_same(loss_of(leaf, batch, in_batch_negatives=False), theirs, leaf)


def test_texts_that_are_known_to_be_related_are_no_negatives():
    # Rows 0 and 1 ask the same; row 2 has row 0's answer; row 3's answer is row 0's question.
    texts = [0, 1, 0, 2, 3, 1, 4, 0]
    positive = torch.eye(4).bool()
    numbers = torch.tensor(texts).float()
    known = embedding.known_related(positive, numbers[::2], numbers[1::2])
    assert known.tolist() == [
        [True, True, True, True],
        [True, True, True, True],
        [True, False, True, False],
        [False, False, False, True],
    ]


def test_several_positives_of_a_row_are_compared_with_the_negatives_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    losses, anchor = embedding.infonce(
        logits, torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    )
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.0))]
    assert losses.tolist() == pytest.approx(expected) and anchor.tolist() == [0, 0]


def test_a_list_of_graded_documents_by_hand():
    # Of one query: worth 2, 1, 0, with scores 1, 0, 0; of another one of each kind, equal.
    scores = torch.tensor([1.0, 0.0, 0.0, 3.0, 3.0])
    batch = batch_of([2.0, 1.0, 0.0, 1.0, 0.0], [0, 0, 0, 1, 1])
    better = reranking.is_better(batch.labels, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    losses, document = reranking.listwise(scores, better)
    e = math.e
    expected = [math.log((e + 2) / e), math.log(2.0), math.log(2.0)]
    assert losses.tolist() == pytest.approx(expected) and document.tolist() == [0, 1, 3]
    algorithm = algorithm_of("reranker", reranking={"loss": "listwise"})
    loss, metrics = reranking_objective(scores, None, batch, algorithm, Denominators(5, 5, 2))
    assert loss.item() == pytest.approx(((expected[0] + expected[1]) / 2 + expected[2]) / 2)
    # Of three comparisons two are right; of one none, as equals are not ordered.
    assert float(metrics["reranking/accuracy"].value) == pytest.approx((2 / 3 + 0) / 2)


def test_pairs_of_documents_have_the_logistic_loss_of_their_difference():
    batch = batch_of([1.0, 0.0, 0.0], [0, 0, 0])
    algorithm = algorithm_of("reranker", reranking={"loss": "pairwise"})
    loss, _ = reranking_objective(torch.tensor([1.0, 0.0, 2.0]), None, batch, algorithm, Denominators(3, 3, 1))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.0)) + math.log1p(math.exp(1.0))) / 2)


def test_ranks_by_hand():
    found = sequence_metrics.rank_metrics(
        np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.1]]), np.array([[True, False, True], [True, False, False]])
    )
    # The relevant ones stand second and third; a tie stands behind.
    gain = 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"].tolist() == pytest.approx([gain / (1 + 1 / math.log2(3)), 1 / math.log2(3)])
    assert found["mrr"].tolist() == [0.5, 0.5]
    assert found["recall@1"].tolist() == [0.0, 0.0] and found["recall@10"].tolist() == [1.0, 1.0]


def test_ranks_and_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    scores, worth = random.normal(size=(6, 20)), random.integers(0, 4, (6, 20)).astype(float)
    ours = sequence_metrics.rank_metrics(scores, worth > 0, worth)["ndcg@10"].mean()
    assert ours == pytest.approx(metrics.ndcg_score(worth, scores, k=10))
    chosen, true = random.random((30, 4)) > 0.5, random.random((30, 4)) > 0.6
    assert sequence_metrics.f1_scores(chosen, true).tolist() == pytest.approx(
        metrics.f1_score(true, chosen, average=None).tolist()
    )


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    values, others = random.integers(0, 5, 40).astype(float), random.normal(size=40)
    assert sequence_metrics.spearman(values, others) == pytest.approx(stats.spearmanr(values, others).statistic)
    assert sequence_metrics.pearson(values, others) == pytest.approx(stats.pearsonr(values, others).statistic)
    assert math.isnan(sequence_metrics.pearson(values, np.ones(40)))


def test_several_numbers_a_text_correlate_each_by_itself():
    # The second number is a thousand times the first: taken together they would correlate whatever is said of texts.
    targets = np.array([[1.0, 1000.0], [2.0, 3000.0], [3.0, 2000.0]], dtype=np.float32)
    empty = (np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool), np.zeros(1, dtype=np.float32))
    samples = [Sample(*empty, targets=row) for row in targets]
    outputs = np.array([[1.0, 1000.0], [2.0, 2000.0], [3.0, 3000.0]], dtype=np.float32)
    algorithm = algorithm_of("classification", classification={"problem": "regression", "targets": 2})
    found = sequence_metrics.classification_metrics(samples, outputs, algorithm)
    assert found == pytest.approx({"regression/pearson": (1 + 0.5) / 2, "regression/spearman": (1 + 0.5) / 2})


def test_a_document_that_several_rows_have_is_found_by_each():
    # Anchors 0 and 1 share their document; the third's is its own.
    samples = [
        Sample(
            *(np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool), np.zeros(1, dtype=np.float32)),
            group=group,
            label=label,
            text=text,
        )
        for group, label, text in [(0, 0.0, 0), (0, 1.0, 1), (1, 0.0, 2), (1, 1.0, 1), (2, 0.0, 4), (2, 1.0, 5)]
    ]
    outputs = np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.1], [0, 1], [0.1, 1]], dtype=np.float32)
    found = sequence_metrics.embedding_metrics(samples, outputs, algorithm_of("embedding"))
    assert found["retrieval/recall@1"] == found["retrieval/ndcg@10"] == 1.0
