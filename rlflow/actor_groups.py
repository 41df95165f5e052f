"""The actor groups of a stage: which class each role runs and with which arguments, how they get ready and end.

Where they run is decided by who makes the groups: rlflow.placement on Ray, rlflow.in_process in this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlflow.actor_memory import longest_sequence
from rlflow.actors.actor_group import ActorFailure, ActorGroup, Pending, Transport
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.reward_server import RewardServer
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.actors.teacher_model import TeacherModel
from rlflow.actors.teacher_server import TeacherServer
from rlflow.actors.trainer import Trainer
from rlflow.actors.value_trainer import ValueTrainer
from rlflow.policy_weights import sends_merged, weight_transport
from rlflow.recipe import AdapterBlock, ModelBlock, Recipe, TrainerBlock
from rlflow.roles import Role, roles, rollout_engine

CLOSE_TIMEOUT_S = 3.0
"""A reward server that is busy for longer is killed with its call."""
RELEASE_TIMEOUT_S = 5.0
"""Ray answers in milliseconds, or not at all once its processes are gone."""
TRAINERS = ("trainer", "critic")
CALLS_AT_ONCE = {"rollout": 16}
"""Of an actor of these roles: one call waits inside for what is finished while others come in. There must be room for
it while an engine loads for minutes and everything that is asked of it meanwhile waits."""


Construct = Callable[[int], tuple[type, dict[str, Any]]]
"""The plain class of a role and the arguments of its actor of a rank."""


@dataclass(slots=True)
class Actors:
    """The actor groups of one stage."""

    trainer: ActorGroup[Trainer] | None
    """Of the policy, or of the reward model, classifier, reranker or embedding model that the stage trains; None where
    it samples."""
    rollout: ActorGroup[RolloutWorker] | None
    rewards: ActorGroup[RewardServer] | None
    critic: ActorGroup[ValueTrainer] | None
    reference: ActorGroup[ReferenceModel] | None
    teacher: ActorGroup[TeacherModel] | None = None
    """Or of servers' clients, which have the same verbs."""
    release: Callable[[], None] = lambda: None
    """Gives back what the groups shared."""
    starting: list[Pending[Any]] = field(default_factory=list)

    @classmethod
    def of(cls, groups: Mapping[str, ActorGroup[Any]], release: Callable[[], None]) -> Actors:
        """Args: groups: By role."""
        return cls(
            trainer=groups.get("trainer"),
            rollout=groups.get("rollout"),
            rewards=groups.get("rewards"),
            critic=groups.get("critic"),
            reference=groups.get("reference"),
            teacher=groups.get("teacher"),
            release=release,
        )

    def begin_setup(self, recipe: Recipe) -> None:
        """Has every actor load what it needs. Waits only for the address at which several trainers meet.

        Raises:
            ActorFailure: There is none: the first of them died, failed or did not answer.
        """
        for trainer in (self.trainer, self.critic):
            if trainer is None:
                continue
            address = None
            if len(trainer) > 1:
                meeting = trainer.start(0, Trainer.rendezvous)
                first = Pending([trainer.name_of(0)], "rendezvous", [meeting], trainer.transport)
                address = first.get(recipe.run.startup_timeout_s)[0]
            self.starting.append(trainer.start_all(Trainer.setup, address))
        if self.rollout:
            self.starting.append(self.rollout.start_all(RolloutWorker.ready))
        if self.rewards:
            self.starting.append(self.rewards.start_all(RewardServer.ready))
        for frozen in (self.reference, self.teacher):
            if frozen:
                self.starting.append(frozen.start_all(ReferenceModel.ready))

    def wait_ready(self, timeout_s: float) -> dict[str, float]:
        """Waits until every actor has loaded what it needs. Returns seconds each role took, by its slowest actor."""
        seconds = {}
        for pending in self.starting:
            ready = pending.get(timeout_s)
            role = pending.names[0].partition("[")[0]
            seconds[role] = max(r if isinstance(r, float) else r.seconds for r in ready)
        return seconds

    def close(self) -> None:
        """Ends all actors and gives back what was reserved, within `CLOSE_TIMEOUT_S` and `RELEASE_TIMEOUT_S`."""
        if self.rewards is not None:
            # Killed with its actor, a reward child leaves behind what a function has detached from it.
            with suppress(ActorFailure):
                self.rewards.start_all(RewardServer.close).get(CLOSE_TIMEOUT_S)
        end_groups(self.groups(), self.release)

    def groups(self) -> list[ActorGroup[Any]]:
        """Those that there are."""
        groups = [self.trainer, self.rollout, self.rewards, self.critic, self.reference, self.teacher]
        return [group for group in groups if group is not None]


def end_groups(groups: Sequence[ActorGroup[Any]], release: Callable[[], None]) -> None:
    """Kills the groups' actors, then releases what they shared. Gives up after `RELEASE_TIMEOUT_S`.

    A Ray whose own processes were killed first never answers; what it held is gone with them.
    """
    ended: Future[None] = Future()

    def end() -> None:
        try:
            for group in groups:
                group.kill()
            release()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    # A daemon: the process does not wait for it at its end.
    threading.Thread(target=end, name="end-actors", daemon=True).start()
    if wait([ended], timeout=RELEASE_TIMEOUT_S).done:
        ended.result(timeout=0)


def start_actors(
    recipe: Recipe,
    model: ModelBlock,
    directory: Path,
    max_model_len: int,
    transport_for: Callable[[Role, Construct], Transport],
    release: Callable[[], None] = lambda: None,
) -> Actors:
    """Starts the actors of a stage: all of them, or on a failure none.

    Args:
        transport_for: Where the actors of a role live.
        release: Gives back what they share, once they have ended.

    Raises:
        ActorFailure: One of them could not be started.
    """
    groups: dict[str, ActorGroup[Any]] = {}
    try:
        for role in roles(recipe):
            construct = partial(constructor_of, role, recipe, model, directory, max_model_len)
            timeout_s = recipe.trainer.timeout_s if role.name in TRAINERS else recipe.rollout.timeout_s
            groups[role.name] = ActorGroup(role.name, transport_for(role, construct), role.workers, timeout_s)
        actors = Actors.of(groups, release)
        actors.begin_setup(recipe)
    except BaseException:
        end_groups(list(groups.values()), release)
        raise
    return actors


def constructor_of(
    role: Role, recipe: Recipe, model: ModelBlock, directory: Path, max_model_len: int, rank: int
) -> tuple[type, dict[str, Any]]:
    """The plain class of a role and the arguments of one of its actors."""
    threads, seed = role.threads, recipe.run.seed
    match role.name:
        case "trainer":
            arguments = _trainer_arguments(model, recipe.trainer, role, rank, seed)
            if recipe.algorithm.learning.head != "token":
                return SequenceTrainer, {**arguments, "algorithm": recipe.algorithm}
            return PolicyTrainer, {
                **arguments,
                "has_tokens_alone": recipe.family == "online" or recipe.needs_teacher,
                "sends_merged": sends_merged(recipe),
                "transport": weight_transport(recipe).name,
                "reference": recipe.held_reference(model),
            }
        case "critic":
            path = None if recipe.critic is None else recipe.critic.path
            # A critic is trained whole, also where the policy is an adapter.
            whole = model.model_copy(update={"adapter": None, "expand": None})
            start = whole if path is None else _other_model(path, model)
            # The device follows the critic's own GPUs.
            block = recipe.trainer.model_copy(update={"gpus_per_worker": role.gpus})
            return ValueTrainer, _trainer_arguments(start, block, role, rank, seed)
        case "rollout":
            return RolloutWorker, {
                "model": model,
                "rollout": recipe.rollout,
                "server": recipe.rollout_server,
                "rank": rank,
                "engine": rollout_engine(recipe),
                "max_model_len": max_model_len,
                "num_threads": threads,
                "seed": seed,
                "run_directory": directory,
                "environment": recipe.environment,
                "template_date": recipe.data.template_date,
                "gets_merged": sends_merged(recipe),
                "is_whole": not recipe.trains,
            }
        case "rewards":
            server = recipe.reward_server
            children = {"children": server.children, "memory_gib": server.memory_gib, "environment": server.environment}
            return RewardServer, {"rewards": recipe.scoring, **children}
        case "teacher":
            return _teacher(role, recipe, model, threads)
        case _:
            frozen = _reference(recipe, model)
            # Liger's kernels need a GPU, which the policy's trainer has and the reference may not.
            frozen = frozen.model_copy(update={"liger": model.liger and role.gpus > 0})
            return ReferenceModel, {
                "model": frozen,
                "gpus": role.gpus,
                "num_threads": threads,
                "seed": seed,
                "tokens_of": model if recipe.family == "online" else None,
            }


def _reference(recipe: Recipe, model: ModelBlock) -> ModelBlock:
    """The frozen model that has actors of its own."""
    path, adapter = recipe.reference.path, recipe.reference.adapter
    frozen = model if path is None else _other_model(path, model)
    return frozen if adapter is None else frozen.model_copy(update={"adapter": AdapterBlock(path=adapter)})


def _teacher(role: Role, recipe: Recipe, model: ModelBlock, threads: int) -> tuple[type, dict[str, Any]]:
    block = recipe.teacher
    if block.url is not None:
        return TeacherServer, {"teacher": block, "policy": model, "longest": longest_sequence(recipe)}
    assert block.path is not None
    frozen = _other_model(block.path, model)
    return TeacherModel, {
        "model": frozen if block.dtype is None else frozen.model_copy(update={"dtype": block.dtype}),
        "gpus": role.gpus,
        "num_threads": threads,
        "seed": recipe.run.seed,
        # Embeddings of one tokenizer may be padded to different sizes.
        "tokens_of": model,
    }


def _other_model(path: str, model: ModelBlock) -> ModelBlock:
    """One of the recipe's models beside the policy: loaded as that is, as far as it is about the recipe."""
    return ModelBlock(path=path, dtype=model.dtype, trust_remote_code=model.trust_remote_code)


def _trainer_arguments(model: ModelBlock, block: TrainerBlock, role: Role, rank: int, seed: int) -> dict[str, Any]:
    world = {"rank": rank, "world_size": role.workers}
    return {"model": model, "trainer": block, "num_threads": role.threads, "seed": seed, **world}
