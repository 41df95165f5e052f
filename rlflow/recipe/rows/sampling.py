"""The row that trains nothing: a model answers prompts, and the stages behind it learn from what is kept."""

from __future__ import annotations

from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_PROMPTS = Learning("sample", "none", "prompt", has_entropies=False)

ROWS: dict[str, AlgorithmRow] = {
    "sample": AlgorithmRow(
        "sampling",
        FROM_PROMPTS,
        "answers a data set, scores the answers and keeps the good ones: rows for the stages behind it",
        "arXiv 2308.01825",
        {"group_size": 4},
    ),
}
