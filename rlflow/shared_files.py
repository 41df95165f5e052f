"""What the actors of a run need under the same path on every node, asked of the nodes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlflow.driver.errors import RunError
from rlflow.driver.resuming import models_of, rewards_of
from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.own_functions import own_functions

_ASK_TIMEOUT_S = 120.0
"""A node may have to fetch a job's working directory first."""
_REMEDY = "put it on a file system that all nodes share, under the same path (cluster/README.md)"
_READERS: Mapping[str, frozenset[str]] = {
    "model.path": frozenset({"trainer", "critic", "reference", "rollout"}),
    "model.adapter.path": frozenset({"trainer", "reference", "rollout"}),
    "reference.path": frozenset({"reference"}),
    "reference.adapter": frozenset({"trainer", "reference"}),
    "algorithm.critic.path": frozenset({"critic"}),
    "teacher.path": frozenset({"teacher"}),
}
"""Key of a model -> roles whose actors load it."""
_OF_TRAINERS = ("algorithm.loss", "algorithm.preference", "trainer.optimizer")
"""Functions of the user's own that trainers call; the driver calls the others."""


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file or directory that several nodes have to see."""

    key: str
    """Of the recipe."""
    path: str
    """As the actors are given it; a relative one is below their current directory."""
    roles: frozenset[str]


def shared_files(recipe: Recipe, model: ModelBlock, directory: Path) -> Iterator[SharedFile]:
    """What is a file here. Names of models on a hub are none.

    Args:
        model: The recipe's, with a path that exists.
        directory: Of the run; trainers write checkpoints into it.
    """
    yield SharedFile("run.output_dir", str(directory), frozenset({"trainer", "critic"}))
    rewards = frozenset({"rewards"})
    models = {**models_of(recipe), "model.path": str(model.path)}
    for key, path in models.items():
        if Path(path).exists():
            yield SharedFile(key, path, _READERS.get(key, rewards))
    for key, plugin, roles in _plugins(recipe):
        file = plugin.rpartition(":")[0]
        if Path(file).exists():
            yield SharedFile(key, file, roles)


def _plugins(recipe: Recipe) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(key, `file.py:function` or `module:function`, roles whose actors import it) of the user's own functions."""
    for key, reward in rewards_of(recipe).items():
        if reward.plugin is not None:
            yield f"{key}.plugin", reward.plugin, frozenset({"rewards"})
    for key, function in own_functions(recipe).items():
        if key in _OF_TRAINERS:
            yield f"{key}.plugin", function.plugin, frozenset({"trainer"})
    if (environment := recipe.environment) is not None:
        named = {"plugin": environment.plugin, **{f"tools.{i}": tool for i, tool in enumerate(environment.tools)}}
        for key, plugin in named.items():
            if plugin is not None:
                yield f"environment.{key}", plugin, frozenset({"rollout"})


def require_shared(files: list[SharedFile], roles_on: Mapping[str, frozenset[str]]) -> None:
    """Asks every node but this one for the files that its actors need.

    Args:
        roles_on: Node id -> roles whose actors are placed there.

    Raises:
        RunError: A node lacks one, has no rlflow, or does not answer.
    """
    here = ray.get_runtime_context().get_node_id()
    wanted = {node: [file for file in files if file.roles & roles] for node, roles in roles_on.items() if node != here}
    look = ray.remote(_make_look())
    asked = {
        node: look.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), max_retries=0
        ).remote([file.path for file in needed])
        for node, needed in wanted.items()
    }
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    for node, ref in asked.items():
        name = f"node {addresses.get(node, node)} (of {', '.join(sorted(roles_on[node]))})"
        try:
            has_rlflow, missing = ray.get(ref, timeout=_ASK_TIMEOUT_S)
        except GetTimeoutError:
            raise RunError(f"{name} has not said within {_ASK_TIMEOUT_S:g} s which files it has") from None
        except RayError as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{name} could not be asked which files it has: {said[-1]}") from error
        if not has_rlflow:
            raise RunError(f"{name} has no rlflow: install it there, or send it with the job (rlflow submit)")
        for file in wanted[node]:
            if file.path in missing:
                raise RunError(f"{file.key}: {name} does not have {file.path}: {_REMEDY}")


def _make_look():
    """What a node is asked, as a function that travels whole: rlflow may not be there."""

    def look(paths: list[str]) -> tuple[bool, list[str]]:
        import importlib.util
        import os

        found = importlib.util.find_spec("rlflow") is not None
        return found, [path for path in paths if not os.path.exists(os.path.expanduser(path))]

    return look
