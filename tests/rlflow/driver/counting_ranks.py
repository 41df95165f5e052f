"""A learner whose models are played: ranks that write down what they are given and answer with numbers of the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from rlflow.actors.trainer import UpdateStats
from rlflow.driver.clock import Clock
from rlflow.driver.learner import Learner
from rlflow.recipe import ALGORITHMS, Recipe, algorithm_of
from rlflow.recipe.yaml_source import merge
from rlflow.types import MicroBatch

Answer = Callable[[list[MicroBatch]], Any]


class Ranks:
    """In the place of an ActorGroup."""

    timeout_s = 1.0

    def __init__(self, size: int, answers: Mapping[str, Answer], updates: Sequence[UpdateStats] = ()) -> None:
        """
        Args:
            answers: Method -> what it returns for a rank's micro-batches.
            updates: What optim_step returns, one after the other; gradients of norm 1 when they are used up.
        """
        self.size, self.answers, self.updates = size, answers, list(updates)
        self.calls: list[tuple[str, list[list[MicroBatch]]]] = []
        """Of the calls that take micro-batches: the method, and those of each rank."""
        self.rates: list[float] = []
        """Of every optim_step."""
        self.places: list[tuple[str, Path]] = []
        """Of every save, load and export."""

    def __len__(self) -> int:
        return self.size

    def start_each(self, method: Any, per_rank: Sequence[list[MicroBatch]], *args: Any) -> Any:
        assert len(per_rank) == self.size
        self.calls.append((method.__name__, list(per_rank)))
        answer = self.answers[method.__name__]
        return SimpleNamespace(get=lambda timeout_s: [answer(of_rank) for of_rank in per_rank])

    def call_all(self, method: Any, *args: Any) -> list[UpdateStats]:
        if method.__name__ != "optim_step":
            self.places.append((method.__name__, *args))
            return []
        self.rates.append(args[0])
        return [self.updates.pop(0) if self.updates else UpdateStats(1.0, False)] * self.size

    @property
    def given(self) -> list[list[MicroBatch]]:
        """What each rank was given last."""
        return self.calls[-1][1]

    def samples(self, rank: int) -> list[int]:
        """The numbers of the samples that a rank was given last."""
        return sorted(int(i) for batch in self.given[rank] for i in batch.sample_indices if i >= 0)


def filled(value: float) -> Answer:
    """A forward pass that gives every token this number."""
    return lambda batches: np.full(sum(len(batch.token_ids) for batch in batches), value, dtype=np.float32)


def recipe_of(name: str, **blocks: Any) -> Recipe:
    """A row of the table with changes to its own block and to others."""
    row = ALGORITHMS[name]
    given = {
        "model": {"path": "a/b"},
        "data": {"train": {"path": "a/b"}},
        "rewards": [{"name": "exact_match"}] if row.family == "online" else [],
        "run": {"steps": 1},
    }
    algorithm = algorithm_of(name, **blocks.pop("algorithm", {}))
    return Recipe.model_validate({**merge(given, blocks), "algorithm": algorithm})


def learner_of(recipe: Recipe, num_steps: int = 1, **ranks: Ranks) -> Learner:
    return Learner(recipe, Clock(), num_steps, **cast(Any, ranks))
