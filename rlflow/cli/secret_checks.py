"""Secrets that a recipe lacks: values that were masked where it was written, variables that are not set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rlflow.recipe import Recipe
from rlflow.recipe.problems import Place, Problem
from rlflow.tracking.redact import MASK, is_secret_name, remember_secrets

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""


def remember(recipe: Recipe) -> None:
    """Keeps what is secret in a recipe, and the variables that it names, out of everything that is said from now on."""
    remember_secrets(recipe.model_dump(mode="json"))
    named = [*recipe.reward_server.environment, *(recipe.environment.variables if recipe.environment else ())]
    remember_secrets({"secret": [os.environ[name] for name in named if name in os.environ]})


def in_masked(recipe: Recipe) -> Found:
    """A run's own recipe.yaml has no secrets: where it is run again, they have to be given."""
    for key, value in _texts(recipe.model_dump(mode="json")):
        if value == MASK or f"://{MASK}@" in value or f"={MASK}" in value:
            yield key, f"is a secret that was left out of this file: give it, on the command line {key}=..."


def in_environment(recipe: Recipe) -> Found:
    """Of this machine: variables that rewards are to have."""
    for index, name in enumerate(recipe.reward_server.environment):
        if recipe.needs_rollouts and name not in os.environ:
            yield f"reward_server.environment.{index}", f"{name} is not set: export it, or remove it here"
    for index, name in enumerate(recipe.environment.variables if recipe.environment else ()):
        if name not in os.environ:
            yield f"environment.variables.{index}", f"{name} is not set: export it, or remove it here"


def in_overrides(overrides: Sequence[str]) -> Iterator[Problem]:
    """What a job's command line would show to everybody who sees the cluster's dashboard."""
    for text in overrides:
        key = text.partition("=")[0]
        if any(is_secret_name(part) for part in key.split(".")):
            reason = "is a secret, and everybody who sees the dashboard sees a job's command"
            remedy = "set a variable where Ray starts, and name it in reward_server.environment"
            yield Problem.at(Place("command line"), key, f"{reason}: {remedy}")


def _texts(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, str):
        yield key, data
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, item in items:
        yield from _texts(item, f"{key}.{name}" if key else str(name))
