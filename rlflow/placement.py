"""Recipe -> placement groups -> actor groups on Ray: the one file that says `ray.remote`.

    trainers, critic, reference, rollout workers, reward servers   one placement group: all of them, or none
    whoever joins during the run                                   a placement group of its own

Every actor has a bundle to itself, in which a fresh one takes its place. None is restarted by Ray: a call to one that
died fails at once, and whoever holds the group decides. Actors start side by side; nothing here waits for a model to
load. `Actors.wait_ready` does, with a deadline.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlflow.actor_groups import CALLS_AT_ONCE, TRAINERS, Actors, Construct, end_groups, start_actors
from rlflow.actors.actor_group import ActorFailure
from rlflow.actors.host_memory import allocator_environment
from rlflow.driver.errors import RunError
from rlflow.machine import named_cluster
from rlflow.ray_cluster import (
    ask_for_a_token,
    few_services,
    on_loopback,
    warnings_kept,
    why_not,
)
from rlflow.recipe import ModelBlock, Recipe
from rlflow.roles import Role, roles
from rlflow.shared_files import require_shared, shared_files
from rlflow.tracking.logs import DIRECTORY as LOGS
from rlflow.tracking.logs import last_words, log_path, send_output_to
from rlflow.tracking.redact import secrets_in

_OBJECT_STORE_BYTES = 2 << 30
_FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ActorLogs:
    """The logs of the actors of one role: see rlflow.tracking.logs."""

    role: str
    directory: Path
    """``RUN/logs``, absolute: an actor's current directory may be another."""
    secrets: Sequence[str]
    """What is left out of them."""

    def written_by(self, cls: type, rank: int) -> type:
        """A class whose actor is one of ``cls``, and prints to its log from the first."""
        actor = f"{self.role}[{rank}]"
        path, secrets = log_path(self.directory, actor), self.secrets

        class Logged(cls):
            def __init__(self, **arguments: Any) -> None:
                send_output_to(path, actor, secrets)
                super().__init__(**arguments)

        Logged.__name__, Logged.__qualname__, Logged.__module__ = cls.__name__, cls.__qualname__, cls.__module__
        return Logged

    def last_words(self, actor: str) -> str:
        return last_words(log_path(self.directory, actor))


class RayTransport:
    """Actors in processes of their own, each in a bundle of a placement group. One object serves one group."""

    def __init__(
        self,
        construct: Construct,
        options: Mapping[str, Any],
        bundles: Sequence[tuple[PlacementGroup, int]],
        logs: ActorLogs | None = None,
    ) -> None:
        """
        Args:
            options: Ray's, of every actor. ``num_cpus`` and ``num_gpus`` are also what a place of its own reserves.
            bundles: The places of the first actors: a placement group and the index of a bundle in it.
            logs: Where what the actors print goes; into Ray's own files when absent.
        """
        self._construct, self._options, self._logs = construct, dict(options), logs
        self._free = list(bundles)
        self._places: dict[int, tuple[PlacementGroup, int]] = {}
        self._own: dict[int, PlacementGroup] = {}
        """Rank -> the placement group that is this actor's alone."""

    def create(self, rank: int) -> Any:
        if rank not in self._places:
            if not self._free:
                self._own[rank] = placement_group([_bundle(self._options)])
                self._free.append((self._own[rank], 0))
            self._places[rank] = self._free.pop(0)
        group, index = self._places[rank]
        place_at = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        cls, arguments = self._construct(rank)
        if self._logs is not None:
            cls = self._logs.written_by(cls, rank)
        return ray.remote(cls).options(**self._options, scheduling_strategy=place_at).remote(**arguments)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    def leave(self, rank: int) -> None:
        place = self._places.pop(rank, None)
        if (own := self._own.pop(rank, None)) is not None:
            remove_placement_group(own)
        elif place is not None:
            self._free.append(place)

    def call(self, handle: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ray.ObjectRef:
        return getattr(handle, method).remote(*args, **kwargs)

    def wait(self, refs: Sequence[ray.ObjectRef], timeout_s: float) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
        if not refs:
            time.sleep(timeout_s)
            return [], []
        done, waiting = ray.wait(list(refs), num_returns=1, timeout=timeout_s)
        if not done or not waiting:
            return done, waiting
        also, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return done + also, waiting

    def fetch(self, ref: ray.ObjectRef, actor: str, call: str) -> Any:
        try:
            return ray.get(ref, timeout=_FETCH_TIMEOUT_S)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise ActorFailure.raised(actor, call, cause) from error
        except RayActorError as error:
            last_words = "" if self._logs is None else f"; {self._logs.last_words(actor)}"
            raise ActorFailure(actor, call, _death(error) + last_words, died=True) from error
        except GetTimeoutError as error:
            raise ActorFailure(
                actor, call, f"its result could not be fetched within {_FETCH_TIMEOUT_S:.0f} s"
            ) from error
        except RayError as error:
            # The actor had answered, and what it said is gone: with its node, or out of a store that was full.
            said = str(error).strip().splitlines() or [""]
            raise ActorFailure(
                actor, call, f"what it answered is lost ({type(error).__name__}: {said[0]})", died=True
            ) from error

    def put(self, value: Any) -> ray.ObjectRef:
        return ray.put(value)


def _death(error: RayActorError) -> str:
    lines = str(error).strip().splitlines()
    # The last line of a traceback is what was raised.
    return f"it could not be started: {lines[-1]}" if error.actor_init_failed else f"the actor died ({lines[0]})"


def _bundle(options: Mapping[str, Any]) -> dict[str, float]:
    """What Ray reserves for one actor; it refuses a bundle of nothing."""
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    return {name: amount for name, amount in amounts.items() if amount} or {"memory": 1}


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
            raise RunError(f"RAY_ADDRESS is {address}, and that cluster cannot be joined: {why_not(error)}") from error
        return True
    wanted = max(sum(role.cpus * role.workers for role in roles(recipe)) for recipe in recipes)
    ask_for_a_token()
    with on_loopback(), few_services():
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
        RunError: The cluster cannot hold them: what is asked for and what there is. A node lacks a file that its
            actors need.
        ActorFailure: One of them could not be started.
    """
    wanted = roles(recipe)
    group = _reserve(wanted, recipe.run.startup_timeout_s)
    try:
        require_shared(list(shared_files(recipe, model, directory)), _roles_on(group, wanted))
    except RunError:
        end_groups([], lambda: remove_placement_group(group))
        raise
    has_gpus = "GPU" in ray.cluster_resources()
    logs = directory.absolute() / LOGS
    # An actor knows those of its own environment.
    secrets = secrets_in(recipe.model_dump(mode="json"))
    first_of = {role.name: sum(before.workers for before in wanted[:i]) for i, role in enumerate(wanted)}

    def transport_for(role: Role, construct: Construct) -> RayTransport:
        bundles = [(group, first_of[role.name] + rank) for rank in range(role.workers)]
        of_role = ActorLogs(role.name, logs, secrets)
        return RayTransport(construct, options_of(role, has_gpus=has_gpus), bundles, of_role)

    def release() -> None:
        remove_placement_group(group)
        rays_words.close()

    rays_words = ExitStack()
    rays_words.enter_context(warnings_kept(logs / "ray.log"))
    return start_actors(recipe, model, directory, max_model_len, transport_for, release)


def options_of(role: Role, *, has_gpus: bool) -> dict[str, Any]:
    """Ray's options of every actor of a role."""
    options: dict[str, Any] = {"num_cpus": role.cpus, "num_gpus": role.gpus}
    if (calls := CALLS_AT_ONCE.get(role.name)) is not None:
        options["max_concurrency"] = calls
    if variables := environment(role, has_gpus=has_gpus):
        options["runtime_env"] = {"env_vars": variables}
    return options


def environment(role: Role, *, has_gpus: bool) -> dict[str, str]:
    """Of an actor's process, and of its children.

    Ray shows all GPUs of a node to an actor that reserved none. Where the cluster has none there is nothing to hide,
    and actors without an environment of their own start sooner, in processes that wait for them.
    """
    if role.gpus:
        return {}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if has_gpus else {}
    return {**hidden, **(allocator_environment() if role.name in TRAINERS else {})}


def _roles_on(group: PlacementGroup, wanted: Sequence[Role]) -> dict[str, frozenset[str]]:
    """Node id -> names of the roles that have a bundle there."""
    names = [role.name for role in wanted for _ in range(role.workers)]
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return {node: frozenset(names[index] for index, at in nodes.items() if at == node) for node in set(nodes.values())}


def _reserve(wanted: list[Role], timeout_s: float) -> PlacementGroup:
    bundles = [_bundle({"num_cpus": role.cpus, "num_gpus": role.gpus}) for role in wanted for _ in range(role.workers)]
    group = placement_group(bundles, strategy="PACK")
    total = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        asked = sum(bundle.get(name, 0) for bundle in bundles)
        if asked > total.get(name, 0):
            end_groups([], lambda: remove_placement_group(group))
            needs = ", ".join(f"{r.name} {r.workers} x ({r.cpus:g} CPU, {r.gpus:g} GPU)" for r in wanted)
            raise RunError(
                f"the cluster has {total.get(name, 0):g} {name}, the recipe asks for {asked:g}: {needs}; "
                "lower workers, cpus_per_worker or gpus_per_worker"
            )
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError:
        end_groups([], lambda: remove_placement_group(group))
        raise RunError(
            f"no room for {bundles} within {timeout_s:.0f} s; free now: {ray.available_resources()}"
        ) from None
    return group
