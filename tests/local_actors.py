"""The driver without Ray: the same plain classes, called in this process, one after the other.

A whole run takes a second instead of half a minute. What only real actors show (several ranks, deaths, deadlines) is
tested with Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow import placement
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.reward_server import RewardServer
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.trainer import Trainer
from rlflow.placement import Actors
from rlflow.plan import roles
from rlflow.recipe import ModelBlock, Recipe


class Done:
    """A result that is there at once, in the place of an object reference."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Failed(Done):
    """A failure that shows when somebody asks for the result, as an actor's does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def value(self) -> Any:
        raise self.error


class DonePending:
    def __init__(self, refs: Sequence[Done]) -> None:
        self.refs = list(refs)

    def get(self, timeout_s: float) -> list[Any]:
        return [ref.value for ref in self.refs]


class LocalGroup:
    """ActorGroup's calls, on objects of this process."""

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self.name, self.actors, self.timeout_s = name, list(actors), 60.0

    def __len__(self) -> int:
        return len(self.actors)

    def name_of(self, rank: int) -> str:
        return f"{self.name}[{rank}]"

    def start(self, rank: int, method: Any, *args: Any, **kwargs: Any) -> Done:
        try:
            given = [arg.value if isinstance(arg, Done) else arg for arg in args]
            return Done(getattr(self.actors[rank], method.__name__)(*given, **kwargs))
        except Exception as error:
            return Failed(error)

    def get(self, rank: int, method: Any, ref: Done) -> Any:
        return ref.value

    def start_all(self, method: Any, *args: Any, **kwargs: Any) -> DonePending:
        return DonePending([self.start(rank, method, *args, **kwargs) for rank in range(len(self))])

    def call_all(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return self.start_all(method, *args, **kwargs).get(self.timeout_s)

    def start_each(self, method: Any, per_rank: Sequence[Any], *args: Any, **kwargs: Any) -> DonePending:
        return DonePending([self.start(rank, method, item, *args, **kwargs) for rank, item in enumerate(per_rank)])

    def call_each(self, method: Any, per_rank: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return self.start_each(method, per_rank, *args, **kwargs).get(self.timeout_s)

    def kill(self) -> None:
        for actor in self.actors:
            if isinstance(actor, RewardServer):
                actor.close()


class _NoPlacementGroup:
    pass


class LocalActors(Actors):
    def close(self) -> None:
        for group in (self.trainer, self.rollout, self.rewards, self.critic, self.reference):
            if group is not None:
                group.kill()


def place(recipe: Recipe, model: ModelBlock, directory: Path, max_model_len: int) -> Actors:
    """In the place of rlflow.placement.place. Trainers have one rank each."""
    groups: dict[str, Any] = {}
    for role in roles(recipe):
        members = []
        for rank in range(role.workers):
            cls, arguments = placement._constructor(role, rank, recipe, model, directory, max_model_len)
            members.append(cls(**arguments))
        groups[role.name] = LocalGroup(role.name, members)
    names = ("trainer", "rollout", "rewards", "critic", "reference")
    actors = LocalActors(**{name: groups.get(name) for name in names}, group=_NoPlacementGroup())  # pyright: ignore
    ready = {"rollout": RolloutWorker.ready, "rewards": RewardServer.ready, "reference": ReferenceModel.ready}
    for name, group in groups.items():
        assert name not in ("trainer", "critic") or len(group) == 1, "several ranks need real processes"
        if name in ready:
            group.call_all(ready[name])
        else:
            group.call_all(Trainer.setup, None)
    return actors


def use_local_actors(monkeypatch: Any) -> None:
    """Runs of this test place their actors in this process."""
    import torch

    assert threading.current_thread() is threading.main_thread()
    torch.set_num_threads(1)
    monkeypatch.setattr("rlflow.driver.run.place", place)
    monkeypatch.setattr("rlflow.driver.run.start_ray", lambda recipes: False)
