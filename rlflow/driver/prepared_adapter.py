"""The adapter that training starts from, where it is computed before: of the model and the first rows of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.image_processor import load_image_processor
from rlflow.data.tokenizer import load_tokenizer
from rlflow.driver.material import load_rows
from rlflow.recipe import ModelBlock, Recipe

INITIAL_ADAPTER = "initial_adapter"


def prepare_adapter(recipe: Recipe, model: ModelBlock, directory: Path) -> ModelBlock:
    """The model block with the path of the adapter's start; as it is where there is nothing to prepare.

    Args:
        model: The recipe's, with a path that exists.
        directory: The run's.

    Raises:
        DataError: It cannot be computed of this model and these rows.
    """
    start = None if model.adapter is None else model.adapter.prepared_start
    if model.adapter is None or start is None:
        return model
    from rlflow.actors import prepared_adapters

    path = directory / INITIAL_ADAPTER
    if not prepared_adapters.is_written(path):
        texts = _texts(recipe, model) if start.reads_data else []
        try:
            prepared_adapters.write_prepared(model, texts, path, seed=recipe.run.seed)
        except ValueError as error:
            raise DataError(str(error)) from error
    return model.model_copy(update={"adapter": model.adapter.model_copy(update={"path": str(path)})})


def _texts(recipe: Recipe, model: ModelBlock) -> list[Any]:
    """Token ids and which are learnt: of rows with answers those, of prompts all."""
    import torch

    from rlflow.actors.prepared_adapters import MOST_TEXTS, MOST_TOKENS
    from rlflow.types import Prompt

    rows, _ = load_rows(recipe, load_tokenizer(model), load_image_processor(model))
    texts = []
    for row in rows[:MOST_TEXTS]:
        # Of a pair the answer that is preferred comes first.
        sequence = row if isinstance(row, Prompt) else row[0]
        ids = torch.from_numpy(sequence.token_ids[:MOST_TOKENS]).long()
        is_learnt = torch.ones(len(ids), dtype=torch.bool)
        if not isinstance(sequence, Prompt):
            is_learnt = torch.from_numpy(sequence.loss_mask[:MOST_TOKENS])
        if len(ids) > 1 and is_learnt[1:].any():
            texts.append((ids, is_learnt))
    if not texts:
        raise DataError("model.adapter.peft.init_lora_weights reads the first rows of data.train, which are too short")
    return texts
