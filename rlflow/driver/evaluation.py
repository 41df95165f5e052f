"""Held-out measurements of the current weights: what they are, and the algorithm's own loss as one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlflow.algorithms.batch_targets import Unit, with_targets
from rlflow.algorithms.sequence_metrics import held_out_metrics
from rlflow.driver.learner import Learner
from rlflow.driver.units import score_units
from rlflow.metrics import values_of
from rlflow.recipe import EvaluationBlock


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a held-out measurement found."""

    metrics: dict[str, float]
    """Keys are ``eval/<name>/<metric>``."""
    score: float | None
    """What the best checkpoint has most of; None where the set that decides it was not measured."""


@dataclass(slots=True)
class UnderWay:
    """An evaluation that goes on while the next step is trained; until it is over engines get no newer weights."""

    step: int
    """Whose weights it measures."""
    evaluators: Sequence[Evaluator]
    of_step: dict[str, float]
    """The step's own metrics."""
    logged: dict[str, float]
    """What else is logged with its own: the step's, where the line of an earlier process is written anew."""
    checkpoint: Path | None = None
    """The step's, where it has one."""


class Evaluator(Protocol):
    block: EvaluationBlock

    def prepare(self) -> None:
        """Takes what it needs of actors that will end before the steps begin."""

    def begin(self) -> None:
        """Asks for what it measures and waits for nothing: `run` finds it on its way."""

    def run(self) -> Evaluation:
        """Measures, what was begun or anew."""
        ...


class LossEvaluator:
    """The algorithm's objective on held-out rows, as one batch, without a gradient."""

    def __init__(self, learner: Learner, block: EvaluationBlock, units: Sequence[Unit]) -> None:
        self.learner, self.block, self.units = learner, block, list(units)
        self.prefix = f"eval/{block.name}"

    def begin(self) -> None:
        pass

    def prepare(self) -> None:
        self.units = score_units(self.learner, self.units)

    def run(self) -> Evaluation:
        """The metrics of training, e.g. ``eval/heldout/loss/total``, those that need all outputs of a model of
        sequences, e.g. ``eval/heldout/retrieval/ndcg@10``, and the loss, less being better."""
        self.prepare()
        learner = self.learner
        samples = with_targets(self.units, learner.algorithm, learner.logprobs)
        found = learner.evaluate(samples)
        measured = values_of(found.metrics)
        if learner.algorithm.learning.held_out:
            measured |= held_out_metrics(samples, learner.outputs(samples), learner.algorithm)
        metrics = {f"{self.prefix}/{name}": value for name, value in measured.items()}
        return Evaluation(metrics, -found.loss)
