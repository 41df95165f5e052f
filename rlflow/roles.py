"""The actors of a stage: how many of each class, what Ray reserves for them, and how many threads they compute with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlflow.machine import named_cluster, usable_cores
from rlflow.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Role:
    """How many actors of one class, and what Ray reserves for each."""

    name: str
    workers: int
    cpus: float
    gpus: float
    threads: int = 1
    """That each computes with."""


def rollout_engine(recipe: Recipe) -> str:
    """`auto` is vllm where rollout workers have a GPU."""
    if recipe.rollout.engine != "auto":
        return recipe.rollout.engine
    return "vllm" if recipe.rollout.gpus_per_worker else "torch"


def roles(recipe: Recipe) -> list[Role]:
    """Who is placed for a stage."""
    models: dict[str, Any] = {"trainer": recipe.trainer} if recipe.trains else {}
    if recipe.needs_rollouts:
        models["rollout"] = recipe.rollout
    if recipe.critic is not None:
        models["critic"] = recipe.critic
    if recipe.places_reference:
        models["reference"] = recipe.reference
    if recipe.places_teacher:
        models["teacher"] = recipe.teacher
    shared = _threads_by_role(recipe, {name: block.workers for name, block in models.items()})
    found = [_role(name, block, shared[name]) for name, block in models.items()]
    if recipe.needs_rollouts:
        server = recipe.reward_server
        rewards = Role("rewards", server.workers, server.cpus_per_worker, server.gpus_per_worker)
        found.insert(list(models).index("rollout") + 1, rewards)
    return found


def _role(name: str, block: Any, shared_threads: int) -> Role:
    """The actors of a block: threads follow the CPUs that it says, or what GPUs need, or the cores."""
    cpus = 1.0 if block.cpus_per_worker is None else block.cpus_per_worker
    follows = block.cpus_per_worker is None and not block.gpus_per_worker
    return Role(name, block.workers, cpus, block.gpus_per_worker, shared_threads if follows else max(1, int(cpus)))


def _threads_by_role(recipe: Recipe, workers: Mapping[str, int]) -> dict[str, int]:
    """The compute threads of each actor of a role whose recipe does not say how many CPUs it has.

    On a machine that the run has for itself, actors that compute at the same time share the cores, and those that take
    turns have all of them. A cluster's cores are also others': there it is 1.

    Args:
        workers: Actors of each role.
    """
    if named_cluster() is not None:
        return dict.fromkeys(workers, 1)
    cores = usable_cores()
    at_once = {role: sum(workers.get(name, 0) for name in _busy_beside(role, recipe)) for role in workers}
    return {role: max(1, cores // at_once[role]) for role in workers}


def _busy_beside(role: str, recipe: Recipe) -> set[str]:
    """The roles that may compute while one does, itself among them: trainer and critic learn at the same time, every
    other one has its turn, and with staleness generation goes on all the while."""
    learning = {"trainer", "critic"}
    in_its_turn = learning if role in learning else {role}
    if not recipe.run.max_staleness:
        return in_its_turn
    return in_its_turn | {"rollout"} | (learning if role == "rollout" else set())
