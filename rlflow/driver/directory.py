"""The run directory: what is put there before the first step, and how an earlier run's is kept."""

from __future__ import annotations

import json
from pathlib import Path

from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import ModelBlock, Recipe, dump_recipe


def prepare_directory(recipe: Recipe, *, resume: bool) -> Path:
    """Makes the stage's directory with its resolved recipe. Without ``resume`` an earlier run moves aside, whole."""
    directory = Path(recipe.run.output_dir)
    if directory.exists() and not resume:
        _move_aside(directory)
    (directory / "rollouts").mkdir(parents=True, exist_ok=True)
    (directory / "logs").mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(dump_recipe(recipe))
    return directory


def finished(recipe: Recipe) -> bool:
    """Whether the stage has left its final model."""
    return (Path(recipe.run.output_dir) / "final" / "config.json").exists()


def prepare_model(recipe: Recipe, directory: Path) -> ModelBlock:
    """The recipe's model with a path that exists: a new architecture gets a directory with config and tokenizer."""
    model = recipe.model
    if model.architecture is None:
        return model
    assert model.characters is not None
    path = directory / "initial_model"
    path.mkdir(exist_ok=True)
    tokenizer = build_character_tokenizer(model.characters)
    tokenizer.save_pretrained(path)
    config = {
        "tie_word_embeddings": True,
        **model.architecture,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": model.dtype,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return model.model_copy(update={"path": str(path)})


def _move_aside(directory: Path) -> None:
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    directory.rename(aside)
