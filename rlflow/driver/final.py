"""What a run leaves in ``final/``, and what is made of a checkpoint later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow import checkpoint
from rlflow.data.processor_files import copy_processor_files
from rlflow.data.tokenizer import load_tokenizer, save_tokenizer, stop_token_ids, write_stop_tokens
from rlflow.driver.args_json import write_args
from rlflow.driver.resuming import length_of
from rlflow.recipe import ModelBlock, Recipe
from rlflow.tracking.model_card import write_card

if TYPE_CHECKING:
    from rlflow.driver.learner import Learner


def write_final(run_directory: Path, recipe: Recipe, learner: Learner, tokenizer: Any, model: ModelBlock) -> Path:
    """Writes ``final/``, a Hugging Face directory with a model card and a manifest; an older one is replaced."""

    def write(directory: Path) -> None:
        _write_model_directory(directory, run_directory, recipe, tokenizer, model, learner.export)

    steps = checkpoint.saved_steps(run_directory / "checkpoints")
    facts = {"step": steps[-1] if steps else 0, "length": length_of(recipe)}
    return checkpoint.publish_directory(run_directory / "final", facts, write, checkpoint.FINAL_MANIFEST)


def write_export(
    target: Path,
    run_directory: Path,
    saved: Path,
    recipe: Recipe,
    model: ModelBlock,
    progress: Callable[[int, int], None],
) -> Path:
    """Writes what ``final/`` would be if the run had ended at a checkpoint; one that has the name is replaced.

    Args:
        target: The directory to write.
        saved: The checkpoint.
        model: The recipe's, with a path that exists.
        progress: Hears how many weights are read, and of how many.

    Raises:
        ValueError: The checkpoint, or what training started from, cannot be read.
        DiskError: It cannot be written.
    """
    from rlflow.actors.saved_model import export_saved

    step = checkpoint.read_driver_state(saved)["step"]

    def export(directory: Path) -> None:
        seed = recipe.run.seed
        export_saved(saved, directory, model, algorithm=recipe.algorithm, seed=seed, progress=progress)

    def write(directory: Path) -> None:
        _write_model_directory(directory, run_directory, recipe, load_tokenizer(model), model, export, step)

    facts = {"step": step, "checkpoint": checkpoint.sha256(saved / checkpoint.MANIFEST)}
    return checkpoint.publish_directory(target, facts, write, checkpoint.FINAL_MANIFEST)


def is_export_of(target: Path, saved: Path) -> bool:
    """Whether ``target`` is whole and holds what `write_export` made of this very checkpoint."""
    try:
        checkpoint.verify(target, checkpoint.FINAL_MANIFEST)
        manifest = checkpoint.read_manifest(target, checkpoint.FINAL_MANIFEST)
    except checkpoint.CheckpointError:
        return False
    return manifest.get("checkpoint") == checkpoint.sha256(saved / checkpoint.MANIFEST)


def _write_model_directory(
    directory: Path,
    run_directory: Path,
    recipe: Recipe,
    tokenizer: Any,
    model: ModelBlock,
    export: Callable[[Path], None],
    step: int | None = None,
) -> None:
    """Fills a directory with a model, and with what others need to use it.

    Args:
        export: Writes the model's own files.
        step: The card tells of the run up to this one; all of it when left out.
    """
    save_tokenizer(tokenizer, directory)
    copy_processor_files(model, directory)
    # A reward model's has a padding token of its own, and takes its place.
    export(directory)
    write_stop_tokens(directory, stop_token_ids(tokenizer, model))
    write_args(directory, recipe, run_directory)
    write_card(directory, run_directory, step)
