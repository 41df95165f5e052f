"""What a loss that compares the sequences of a step rules out in the other blocks of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlflow.recipe.algorithm_kinds import EmbeddingBlock
from rlflow.recipe.block import Conflict
from rlflow.recipe.sequence_blocks import ContrastiveBlock, InfoNCEBlock

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


def sequence_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """A step of one row has nobody else to compare it with."""
    if not isinstance(recipe.algorithm, EmbeddingBlock) or recipe.data.prompts_per_step > 1:
        return
    loss = recipe.algorithm.embedding
    if isinstance(loss, InfoNCEBlock) and loss.in_batch_negatives:
        reason = "is 1, and the negatives are those of a step's other rows: raise it, or set in_batch_negatives: false"
        yield Conflict(("data.prompts_per_step", "algorithm.embedding.in_batch_negatives"), reason)
    if isinstance(loss, ContrastiveBlock) and loss.loss == "online_contrastive":
        reason = "is 1, and online_contrastive compares a step's pairs: raise it, or set loss: contrastive"
        yield Conflict(("data.prompts_per_step", "algorithm.embedding.loss"), reason)
