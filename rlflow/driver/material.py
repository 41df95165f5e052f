"""What a stage works on beside its actors: its model, tokenizer and rows, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlflow.actors.environment_pool import describe
from rlflow.data.call_reader import require_readable
from rlflow.data.chat import Chat
from rlflow.data.errors import DataError, RowError, Rows, listing
from rlflow.data.image_processor import ImageProcessor, load_image_processor
from rlflow.data.prompts import load_prompts
from rlflow.driver.answers import Answers, load_answers, with_answers
from rlflow.driver.demonstrations import load_demonstrations
from rlflow.driver.references import reject_references
from rlflow.driver.units import load_units
from rlflow.environments import EnvironmentFault
from rlflow.recipe import ModelBlock, Recipe
from rlflow.tracking.tracker import Tracker
from rlflow.types import Prompt


@dataclass(frozen=True, slots=True)
class Material:
    """What a stage works on, beside its actors."""

    model: ModelBlock
    """The recipe's, with a path that exists."""
    tokenizer: Any
    rows: Rows
    """Prompts or units."""
    held_out: Mapping[str, Rows]
    """Of each evaluation, by its key."""
    demonstrations: Rows
    """Trained beside rollouts; none where the recipe names none."""
    answers: Answers | None = None
    """Of the data, where some are trained beside the policy's own."""


def load_material(recipe: Recipe, model: ModelBlock, tokenizer: Any) -> Material:
    """Reads all rows of a stage.

    Raises:
        DataError: Some cannot be used.
    """
    vision = load_image_processor(model)
    rows, held_out = load_rows(recipe, tokenizer, vision)
    answers, shown = load_answers(recipe, tokenizer), load_demonstrations(recipe, tokenizer, vision)
    return Material(model, tokenizer, with_answers(rows, answers), held_out, shown, answers)


def load_rows(recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None = None) -> tuple[Rows, dict[str, Rows]]:
    """The stage's training rows (prompts or units), and the held-out rows of each of its evaluations.

    Args:
        recipe: Of the stage.
        tokenizer: Of its model.
        vision: Of a model that takes pictures.
    """
    data, seed = recipe.data, recipe.run.seed
    tools, in_turns = _tools_of(recipe), recipe.environment is not None
    if recipe.generates:
        rejected = reject_references(recipe.rewards)
        rows = load_prompts(data.train, data, tokenizer, seed, rejected, tools, vision, in_turns=in_turns)
        _require_calls(recipe, tokenizer, rows)
    else:
        rows = load_units(recipe, data, tokenizer, vision)
    held_out: dict[str, Rows] = {}
    for key, block in recipe.evaluations.items():
        if (reward := recipe.reward_of(block)) is not None:
            rejected = reject_references([reward])
            held_out[key] = load_prompts(block.data, data, tokenizer, seed, rejected, tools, vision, in_turns=in_turns)
        else:
            held_out[key] = load_units(recipe, data.model_copy(update={"train": block.data}), tokenizer, vision)
    return rows, held_out


def _tools_of(recipe: Recipe) -> list[dict[str, Any]]:
    """What the environment describes to the policy.

    Raises:
        DataError: It cannot be loaded, or a tool of it cannot be described.
    """
    if recipe.environment is None:
        return []
    try:
        return describe(recipe.environment)
    except EnvironmentFault as error:
        raise DataError(f"environment: {error}") from error


def _require_calls(recipe: Recipe, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """
    Raises:
        DataError: Tools are described to the policy whose calls could not be read.
    """
    if recipe.environment is not None and any(prompt.tools for prompt in prompts):
        try:
            require_readable(Chat(tokenizer), recipe.environment.call_parser)
        except RowError as error:
            raise DataError(f"environment: {error}") from error


def tell_of_rows(tracker: Tracker, notes: Sequence[str], material: Material) -> None:
    """Says what was found in the run's directory, and which rows are not trained as they are."""
    for note in notes:
        tracker.message(note)
    held_out = {f"{key}.data": loaded for key, loaded in material.held_out.items()}
    shown = {"demonstrations.train": material.demonstrations}
    for name, loaded in {"data.train": material.rows, **shown, **held_out}.items():
        if loaded.skipped:
            of_all = len(loaded) + len(loaded.skipped)
            tracker.message(f"{name}: {len(loaded.skipped)} of {of_all} rows left out:{listing(loaded.skipped, 3)}")
        if loaded.notes:
            tracker.message(f"{name}: not all of these rows is shown to the model:{listing(loaded.notes, 3)}")


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimizer steps: as the recipe says, or its epochs over the data."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None
    return max(1, math.ceil(recipe.run.epochs * num_rows / recipe.data.prompts_per_step))


def max_model_len(recipe: Recipe) -> int:
    """Longest prompt and longest completion, or episode, together, training's or evaluation's."""
    measured = [block.max_new_tokens or 0 for block in recipe.evaluations.values()]
    longest = max(recipe.rollout.max_new_tokens, *measured) if measured else recipe.rollout.max_new_tokens
    return recipe.data.max_prompt_tokens + recipe.episode_tokens(longest)
