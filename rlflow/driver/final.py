"""What a run leaves in ``final/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlflow import checkpoint
from rlflow.data.tokenizer import save_tokenizer, stop_token_ids, write_stop_tokens
from rlflow.driver.learner import Learner
from rlflow.driver.resuming import length_of
from rlflow.recipe import ModelBlock, Recipe
from rlflow.tracking.model_card import write_card


def write_final(run_directory: Path, recipe: Recipe, learner: Learner, tokenizer: Any, model: ModelBlock) -> Path:
    """Writes ``final/``, a Hugging Face directory with a model card and a manifest; an older one is replaced."""

    def write(directory: Path) -> None:
        save_tokenizer(tokenizer, directory)
        # A reward model's has a padding token of its own, and takes its place.
        learner.export(directory)
        write_stop_tokens(directory, stop_token_ids(tokenizer, model))
        write_card(directory, run_directory)

    steps = checkpoint.saved_steps(run_directory / "checkpoints")
    facts = {"step": steps[-1] if steps else 0, "length": length_of(recipe)}
    return checkpoint.publish_directory(run_directory / "final", facts, write, checkpoint.FINAL_MANIFEST)
