"""Recipe -> placement group -> actor groups: the one file that says `ray.remote`.

Actors start side by side; nothing here waits for a model to load. `Actors.wait_ready` does, with a deadline.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlflow.actors.actor_group import ActorFailure, ActorGroup, Pending
from rlflow.actors.host_memory import allocator_environment
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.reward_server import RewardServer
from rlflow.actors.reward_trainer import RewardTrainer
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.trainer import Trainer
from rlflow.actors.value_trainer import ValueTrainer
from rlflow.driver.errors import RunError
from rlflow.plan import Role, roles, rollout_engine
from rlflow.ray_cluster import ask_for_a_token, named_cluster, on_loopback
from rlflow.recipe import ModelBlock, Recipe, TrainerBlock

_OBJECT_STORE_BYTES = 2 << 30
CLOSE_TIMEOUT_S = 3.0
"""A reward server that is busy for longer is killed with its call."""
_TRAINERS = ("trainer", "critic")


@dataclass(slots=True)
class Actors:
    """The actor groups of one stage."""

    trainer: ActorGroup[Trainer]
    """Of the policy, or of the reward model that the stage trains."""
    rollout: ActorGroup[RolloutWorker] | None
    rewards: ActorGroup[RewardServer] | None
    critic: ActorGroup[ValueTrainer] | None
    reference: ActorGroup[ReferenceModel] | None
    group: PlacementGroup
    starting: list[Pending[Any]] = field(default_factory=list)

    def wait_ready(self, timeout_s: float) -> dict[str, float]:
        """Waits until every actor has loaded what it needs. Returns seconds each role took, by its slowest actor."""
        seconds = {}
        for pending in self.starting:
            ready = pending.get(timeout_s)
            role = pending.names[0].partition("[")[0]
            seconds[role] = max(r if isinstance(r, float) else r.seconds for r in ready)
        return seconds

    def close(self) -> None:
        if self.rewards is not None:
            # Killed with its actor, a reward child leaves behind what a function has detached from it.
            with suppress(ActorFailure):
                self.rewards.start_all(RewardServer.close).get(CLOSE_TIMEOUT_S)
        for group in (self.trainer, self.rollout, self.rewards, self.critic, self.reference):
            if group is not None:
                group.kill()
        remove_placement_group(self.group)


def start_ray(recipes: Sequence[Recipe]) -> bool:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it set), or starts Ray in this process.

    A cluster of our own promises as many CPUs as the recipe asks for: on a small machine actors take turns. It asks for
    a token and listens on loopback.

    Returns:
        Whether Ray was started or joined here, and not by the caller.

    Raises:
        RunError: The cluster does not let us in.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # As Ray does by itself from 2.60 on; before, it warns that it will. `environment` hides what was not reserved.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (address := named_cluster()) is not None:
        try:
            ray.init(**quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise RunError(f"RAY_ADDRESS is {address}, and that cluster cannot be joined: {error}") from error
        return True
    wanted = max(sum(role.cpus * role.workers for role in roles(recipe)) for recipe in recipes)
    ask_for_a_token()
    with on_loopback():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(wanted + 0.999)),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
    return True


def place(recipe: Recipe, model: ModelBlock, directory: Path, max_model_len: int) -> Actors:
    """Reserves resources and starts the actors of a stage: all of them, or on a failure none.

    Raises:
        RunError: The cluster cannot hold them: what is asked for and what there is.
        ActorFailure: One of them could not be started.
    """
    wanted = roles(recipe)
    group = _reserve(wanted, recipe.run.startup_timeout_s)
    groups: dict[str, ActorGroup] = {}
    has_gpus = "GPU" in ray.cluster_resources()
    with ExitStack() as undo:
        undo.callback(remove_placement_group, group)
        bundle = 0
        for role in wanted:
            timeout_s = recipe.trainer.timeout_s if role.name in ("trainer", "critic") else recipe.rollout.timeout_s
            groups[role.name] = ActorGroup(role.name, [], timeout_s)
            undo.callback(groups[role.name].kill)
            for rank in range(role.workers):
                cls, arguments = _constructor(role, rank, recipe, model, directory, max_model_len)
                place_at = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
                options: dict[str, Any] = {"num_cpus": role.cpus, "num_gpus": role.gpus}
                if variables := environment(role, has_gpus=has_gpus):
                    options["runtime_env"] = {"env_vars": variables}
                options["scheduling_strategy"] = place_at
                groups[role.name].handles.append(ray.remote(cls).options(**options).remote(**arguments))
                bundle += 1
        actors = Actors(
            trainer=groups["trainer"],
            rollout=groups.get("rollout"),
            rewards=groups.get("rewards"),
            critic=groups.get("critic"),
            reference=groups.get("reference"),
            group=group,
        )
        _begin_setup(actors, recipe)
        undo.pop_all()
    return actors


def environment(role: Role, *, has_gpus: bool) -> dict[str, str]:
    """Of an actor's process, and of its children.

    Ray shows all GPUs of a node to an actor that reserved none. Where the cluster has none there is nothing to hide,
    and actors without an environment of their own start sooner, in processes that wait for them.
    """
    if role.gpus:
        return {}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if has_gpus else {}
    return {**hidden, **(allocator_environment() if role.name in _TRAINERS else {})}


def _constructor(
    role: Role, rank: int, recipe: Recipe, model: ModelBlock, directory: Path, max_model_len: int
) -> tuple[type, dict[str, Any]]:
    """The plain class of a role and the arguments of one of its actors."""
    threads, seed = max(1, int(role.cpus)), recipe.run.seed
    match role.name:
        case "trainer":
            arguments = _trainer_arguments(model, recipe.trainer, role, rank, seed)
            if recipe.algorithm.learning.head == "scalar":
                return RewardTrainer, arguments
            return PolicyTrainer, {**arguments, "learns_rollouts": recipe.family == "online"}
        case "critic":
            path = recipe.algorithm.critic.path
            # A critic is trained whole, also where the policy is an adapter.
            whole = model.model_copy(update={"adapter": None})
            start = whole if path is None else _other_model(path, model)
            # The device follows the critic's own GPUs.
            block = recipe.trainer.model_copy(update={"gpus_per_worker": role.gpus})
            return ValueTrainer, _trainer_arguments(start, block, role, rank, seed)
        case "rollout":
            return RolloutWorker, {
                "model": model,
                "rollout": recipe.rollout,
                "rank": rank,
                "engine": rollout_engine(recipe),
                "max_model_len": max_model_len,
                "num_threads": threads,
                "seed": seed,
                "log_directory": directory / "logs",
            }
        case "rewards":
            server = recipe.reward_server
            children = {"children": server.children, "memory_gib": server.memory_gib, "environment": server.environment}
            return RewardServer, {"rewards": recipe.scoring, **children}
        case _:
            path = recipe.reference.path
            frozen = model if path is None else _other_model(path, model)
            # Liger's kernels need a GPU, which the policy's trainer has and the reference may not.
            frozen = frozen.model_copy(update={"liger": model.liger and role.gpus > 0})
            return ReferenceModel, {
                "model": frozen,
                "gpus": role.gpus,
                "num_threads": threads,
                "seed": seed,
                "tokens_of": model if recipe.family == "online" else None,
            }


def _other_model(path: str, model: ModelBlock) -> ModelBlock:
    """One of the recipe's models beside the policy: loaded as that is, as far as it is about the recipe."""
    return ModelBlock(path=path, dtype=model.dtype, trust_remote_code=model.trust_remote_code)


def _trainer_arguments(model: ModelBlock, block: TrainerBlock, role: Role, rank: int, seed: int) -> dict[str, Any]:
    world = {"rank": rank, "world_size": role.workers}
    return {"model": model, "trainer": block, "num_threads": max(1, int(role.cpus)), "seed": seed, **world}


def _begin_setup(actors: Actors, recipe: Recipe) -> None:
    for trainer in (actors.trainer, actors.critic):
        if trainer is None:
            continue
        address = None
        if len(trainer) > 1:
            first = Pending([trainer.name_of(0)], "rendezvous", [trainer.start(0, Trainer.rendezvous)])
            address = first.get(recipe.run.startup_timeout_s)[0]
        actors.starting.append(trainer.start_all(Trainer.setup, address))
    if actors.rollout:
        actors.starting.append(actors.rollout.start_all(RolloutWorker.ready))
    if actors.rewards:
        actors.starting.append(actors.rewards.start_all(RewardServer.ready))
    if actors.reference:
        actors.starting.append(actors.reference.start_all(ReferenceModel.ready))


def _reserve(wanted: list[Role], timeout_s: float) -> PlacementGroup:
    bundles = [{"CPU": role.cpus, "GPU": role.gpus} for role in wanted for _ in range(role.workers)]
    bundles = [{name: n for name, n in bundle.items() if n} or {"memory": 1} for bundle in bundles]
    group = placement_group(bundles, strategy="PACK")
    total = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        asked = sum(bundle.get(name, 0) for bundle in bundles)
        if asked > total.get(name, 0):
            remove_placement_group(group)
            needs = ", ".join(f"{r.name} {r.workers} x ({r.cpus:g} CPU, {r.gpus:g} GPU)" for r in wanted)
            raise RunError(
                f"the cluster has {total.get(name, 0):g} {name}, the recipe asks for {asked:g}: {needs}; "
                "lower workers, cpus_per_worker or gpus_per_worker"
            )
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError:
        remove_placement_group(group)
        raise RunError(
            f"no room for {bundles} within {timeout_s:.0f} s; free now: {ray.available_resources()}"
        ) from None
    return group
