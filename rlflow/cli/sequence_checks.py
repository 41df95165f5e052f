"""Whether ranks can share the tokens of the models that a recipe trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.hub_files import hub_config
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.token_shares import sharing_problem

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""


def in_sequence_parallel(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """Of the policy and the critic, by configs that are on this machine.

    Args:
        to_come: The directory that each earlier stage will write, and the stage.
    """
    ranks, critic = recipe.trainer.sequence_parallel, recipe.critic
    if ranks == 1:
        return
    models = [recipe.model]
    if critic is not None and critic.path is not None:
        models.append(ModelBlock(path=critic.path))
    for model in models:
        config = config_of(model, to_come)
        if config is not None and (problem := sharing_problem(config, ranks)):
            yield "trainer.sequence_parallel", f"{model.path or 'the new model'}: {problem}"


def resolved(model: ModelBlock, to_come: Mapping[str, Recipe]) -> ModelBlock:
    """The model itself, or, where an earlier stage will write it, what that stage starts from."""
    for _ in to_come:
        if model.path is not None and model.path in to_come:
            model = to_come[model.path].model
    return model


def config_of(model: ModelBlock, to_come: Mapping[str, Recipe]) -> Mapping[str, Any] | None:
    """Fields of a model's config, or of what earlier stages start from; None where it is neither on this
    machine nor on a hub that can be reached."""
    model = resolved(model, to_come)
    if model.architecture is not None:
        return model.architecture
    path = model.path or ""
    if not Path(path).exists() and is_hub_id(path):
        return _of_hub(path, model.revision)
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


@cache
def _of_hub(name: str, revision: str | None) -> Mapping[str, Any] | None:
    """Asked for once a process: a hub that cannot be reached takes its time to say so."""
    try:
        config = hub_config(name, revision)
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
