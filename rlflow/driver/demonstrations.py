"""Which demonstrations a step trains beside its rollouts: the step alone decides, so that a resumed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlflow.data.errors import Rows
from rlflow.data.examples import load_examples
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.sampler import Sampler
from rlflow.driver.units import example_units
from rlflow.recipe import Recipe
from rlflow.types import Sample


def load_demonstrations(recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None = None) -> Rows[Sample]:
    """The rows of ``demonstrations.train`` as samples; none where the recipe names none.

    Raises:
        DataError: The rows cannot be used; which, and why.
    """
    block = recipe.demonstrations
    if block is None:
        return Rows([], [])
    data = recipe.data.model_copy(update={"train": block.train})
    rows = load_examples(data, tokenizer, recipe.run.seed, vision)
    return Rows([sample for (sample,) in example_units(rows, data.max_tokens)], rows.skipped, rows.notes)


def demonstrations_of(step: int, samples: Sequence[Sample], recipe: Recipe) -> list[Sample]:
    """Those of a step, counted from 0: they come in an order of their own, epoch after epoch."""
    block = recipe.demonstrations
    if block is None:
        return []
    sampler = Sampler(len(samples), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
    sampler.restore({**sampler.state(), "taken": step * block.per_step})
    return [samples[index] for _, index in sampler.take(block.per_step)]
