"""Forward passes before an update: who computes which numbers of the samples, and when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.teacher_model import TeacherModel
from rlflow.actors.value_trainer import ValueTrainer
from rlflow.driver.model_ranks import ModelRanks
from rlflow.recipe import OnlineBlock, Recipe
from rlflow.recipe.distill_blocks import DivergenceDistillBlock


@dataclass(frozen=True, slots=True)
class Scorer:
    """One forward pass over the samples of a step."""

    name: str
    """The phase of the step that it is."""
    field: str
    """What it fills in every sample: a field of Sample."""
    model: str
    """Whose ranks compute it: trainer, critic, reference or teacher."""
    method: Callable[..., np.ndarray]
    """Of these ranks' class: micro-batches to float32 [N] of their tokens end to end."""
    is_tempered: bool
    """Its logprobs are of the distribution that was sampled from, so that it takes the temperature."""
    is_needed: Callable[[Recipe], bool]
    options: Callable[[Recipe], tuple[Any, ...]] = lambda recipe: ()
    """What the method is given beside the micro-batches and the temperature."""


def _needs_proximal(recipe: Recipe) -> bool:
    """Whether the trainer's logprobs of before the first update take a pass of their own.

    They do for the ratio of later updates, and for a KL in the reward or with a target where the engine's are of
    another distribution.
    """
    algorithm = recipe.algorithm
    if not isinstance(algorithm, OnlineBlock):
        return False
    if algorithm.correction.old_policy == "trainer" and algorithm.num_updates > 1:
        return True
    return recipe.cut_by is not None and algorithm.needs_policy_logprobs


def _asks_teacher(what: Literal["logprobs", "hidden", "top"], recipe: Recipe) -> bool:
    """Whether the teacher is asked for logprobs of the tokens, hidden states, or its most probable tokens."""
    algorithm = recipe.algorithm
    if not isinstance(algorithm, OnlineBlock) or not algorithm.needs_teacher:
        return False
    distill = algorithm.distill
    if not isinstance(distill, DivergenceDistillBlock):
        return what == "logprobs"
    return what == ("hidden" if distill.top_k is None else "top")


def _of_top(recipe: Recipe) -> tuple[Any, ...]:
    """How many tokens, and the temperature of their logprobs."""
    distill = recipe.online.distill
    assert isinstance(distill, DivergenceDistillBlock)
    return distill.top_k, distill.temperature


SCORERS = (
    Scorer(
        "reference", "ref_logprobs", "reference", ReferenceModel.logprobs, True, lambda recipe: recipe.places_reference
    ),
    Scorer(
        "reference",
        "ref_logprobs",
        "trainer",
        PolicyTrainer.reference_logprobs,
        True,
        lambda recipe: recipe.needs_reference and not recipe.places_reference,
    ),
    Scorer(
        "teacher",
        "teacher_logprobs",
        "teacher",
        TeacherModel.logprobs,
        True,
        lambda recipe: _asks_teacher("logprobs", recipe) and recipe.places_teacher,
    ),
    Scorer(
        "teacher",
        "teacher_logprobs",
        "trainer",
        PolicyTrainer.reference_logprobs,
        True,
        lambda recipe: _asks_teacher("logprobs", recipe) and not recipe.places_teacher,
    ),
    Scorer(
        "teacher",
        "teacher_hidden",
        "teacher",
        TeacherModel.hidden_states,
        False,
        lambda recipe: _asks_teacher("hidden", recipe),
    ),
    Scorer(
        "teacher",
        "teacher_top",
        "teacher",
        TeacherModel.top_logprobs,
        False,
        lambda recipe: _asks_teacher("top", recipe),
        _of_top,
    ),
    Scorer("proximal", "proximal_logprobs", "trainer", PolicyTrainer.logprobs, True, _needs_proximal),
    Scorer("values", "old_values", "critic", ValueTrainer.values, False, lambda recipe: recipe.critic is not None),
)
"""All there are, in the order of a step: the reference by actors of its own, or by a trainer of adapters, which holds
what it started from anyway; so the teacher."""


def scorers_of(recipe: Recipe, models: Mapping[str, ModelRanks[Any]]) -> list[Scorer]:
    """Those that a recipe needs.

    Raises:
        ValueError: The ranks of one of them are missing.
    """
    needed = [scorer for scorer in SCORERS if scorer.is_needed(recipe)]
    for scorer in needed:
        if scorer.model not in models:
            raise ValueError(f"{scorer.name} needs the ranks of {scorer.model}, and there are none")
    return needed
