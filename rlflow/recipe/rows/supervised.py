"""The rows that learn from demonstrations and from plain text."""

from __future__ import annotations

from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_EXAMPLES = Learning("sft", "sft", "example")

ROWS: dict[str, AlgorithmRow] = {
    "sft": AlgorithmRow("sft", FROM_EXAMPLES, "cross-entropy on the loss tokens of the batch", "arXiv 2203.02155"),
    "pretrain": AlgorithmRow("sft", FROM_EXAMPLES, "cross-entropy on every token of plain text", "arXiv 2005.14165"),
}
