"""The rows that say something of whole sequences: classes and numbers of texts, embeddings, relevance."""

from __future__ import annotations

from dataclasses import replace

from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_CLASSES = Learning(
    "sft", "classification", "classified", head="classes", has_entropies=False, held_out="classification"
)
FROM_RELATED_TEXTS = Learning(
    "sft", "embedding", "related", head="embedding", batch_targets="texts", has_entropies=False, held_out="embedding"
)
FROM_RANKINGS = Learning("sft", "reranking", "ranked", head="scalar", has_entropies=False, held_out="reranking")
BY_YES_OR_NO = replace(FROM_RANKINGS, objective="yes_no", head="yes_no")

ROWS: dict[str, AlgorithmRow] = {
    "classification": AlgorithmRow(
        "classification",
        FROM_CLASSES,
        "one class a text, any number of them, or numbers; classification.problem says which",
        "arXiv 1810.04805, section 4",
        {"classification": {"problem": "single_label"}},
    ),
    "embedding": AlgorithmRow(
        "embedding",
        FROM_RELATED_TEXTS,
        "related texts near each other (InfoNCE); embedding.loss has the others",
        "arXiv 1807.03748, 2101.06983",
        {"embedding": {"loss": "infonce", "temperature": 0.05}},
    ),
    "reranker": AlgorithmRow(
        "reranking",
        FROM_RANKINGS,
        "a score of a query and a document together; reranking.loss compares those of a query",
        "arXiv 1901.04085",
        {"reranking": {"loss": "pointwise"}},
    ),
    "generative_reranker": AlgorithmRow(
        "reranking",
        BY_YES_OR_NO,
        "as reranker, by the logits of yes and no behind a question, without a head of its own",
        "arXiv 2506.05176",
        {"reranking": {"loss": "pointwise"}},
    ),
}
