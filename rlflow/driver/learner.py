"""The learner: it owns the models that are trained and those that score, and knows when each is asked.

samples --score--> with logprobs and values --update--> every trainer rank: forward_backward, optim_step
                   (reference, teacher, trainer,        the critic's beside them
                   critic)

verb       waits for                                      consumes -> produces
score      a forward pass of every scorer that is needed  samples -> samples with its field
update     every trainer rank, updates of a step          samples -> metrics
weights    every trainer rank                             -> a reference to the policy's snapshot
save, load, export: every trainer rank
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.actors.actor_group import ActorGroup, Reference
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.actors.teacher_model import TeacherModel
from rlflow.actors.trainer import Measured, Trainer, UpdateStats
from rlflow.actors.value_trainer import ValueTrainer
from rlflow.algorithms.kl_reward import kl_of_sequences
from rlflow.algorithms.mixture import mixed
from rlflow.algorithms.selections import with_selection
from rlflow.algorithms.weighing import rollouts_of, weigh
from rlflow.driver.clock import Clock
from rlflow.driver.errors import RunError
from rlflow.driver.model_ranks import ModelRanks
from rlflow.driver.schedules import KLController, LearningRate
from rlflow.driver.scorers import scorers_of
from rlflow.metrics import Metric, over_ranks, over_updates
from rlflow.recipe import AlgorithmBlock, OnlineBlock, Recipe
from rlflow.recipe.algorithm_blocks import KLBlock
from rlflow.types import Denominators, Sample

_ANSWER_S = 30.0
"""A trainer that says nothing for so long is not asked for a checkpoint."""


class Learner:
    def __init__(
        self,
        recipe: Recipe,
        clock: Clock,
        num_steps: int,
        *,
        trainer: ActorGroup[Trainer],
        critic: ActorGroup[ValueTrainer] | None = None,
        reference: ActorGroup[ReferenceModel] | None = None,
        teacher: ActorGroup[TeacherModel] | None = None,
        attention_cost: float = 0.0,
    ) -> None:
        """
        Args:
            num_steps: Of the whole run, for the schedules.
            attention_cost: Of the trainer's model, see `rlflow.batching.pack`.
        """
        self.recipe, self.clock = recipe, clock
        self._num_updates = recipe.algorithm.num_updates
        self._critic_steps = 0 if recipe.critic is None else recipe.critic.warmup_steps
        self._learning_rate = LearningRate(recipe.trainer, num_steps, self._num_updates, self._critic_steps)
        algorithm = recipe.algorithm
        self._kl = KLController(algorithm.kl if isinstance(algorithm, OnlineBlock) else KLBlock(coef=0.0))
        is_online = recipe.algorithm.learning.family == "online"
        self._temperature = recipe.rollout.temperature if is_online else 1.0
        self._max_tokens = recipe.max_completion_tokens if is_online else recipe.data.max_tokens
        groups = {"trainer": trainer, "critic": critic, "reference": reference, "teacher": teacher}
        self._models = _models(recipe, attention_cost, groups)
        self._scorers = scorers_of(recipe, self._models)
        self.num_moves = 0
        """Updates of this process that have changed parameters."""
        self._published = (-1, -1)
        """The version that was asked for last, and `num_moves` then."""
        self.has_trained = False
        """Whether any update had a gradient."""
        self._skipped_in_a_row = 0

    @property
    def algorithm(self) -> AlgorithmBlock:
        """The recipe's, with the KL coefficient of this step."""
        algorithm = self.recipe.algorithm
        return algorithm if self._kl.coef is None else algorithm.model_copy(update={"kl": self._kl.current})

    @property
    def online(self) -> OnlineBlock:
        """``algorithm``, of a recipe that learns from rollouts."""
        assert isinstance(self.algorithm, OnlineBlock)
        return self.algorithm

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with what the models say of them, as far as the algorithm needs it and they do not have it."""
        scored = list(samples)
        for scorer in self._scorers:
            if all(getattr(sample, scorer.field) is not None for sample in scored):
                continue
            with self.clock(scorer.name):
                tempered = (self._temperature,) if scorer.is_tempered else ()
                settings = (*tempered, *scorer.options(self.recipe))
                values = self._models[scorer.model].per_token(scorer.method, scored, *settings)
            scored = [
                replace(sample, **{scorer.field: of_sample}) for sample, of_sample in zip(scored, values, strict=True)
            ]
        return scored

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Of the current policy, float32 [T] of each sample, 0 where nothing is trained."""
        return self._models["trainer"].per_token(PolicyTrainer.logprobs, samples, self._temperature)

    def update(
        self,
        samples: Sequence[Sample],
        step: int,
        counts: np.ndarray | None = None,
        demonstrations: Sequence[Sample] = (),
    ) -> dict[str, float]:
        """Trains on the samples of a step: ``epochs_per_step`` passes of ``updates_per_step`` optimizer updates.

        Args:
            samples: Scored. Those of a group stand next to each other; every update gets as many groups.
            step: Counted from 0.
            counts: See `rlflow.algorithms.weighing.weigh`.
            demonstrations: Of the step; every update gets as many.

        Returns:
            The updates' metrics, each combined as it says. The first update's ratio is 1 to the bit: its denominator is
            its own logprobs, not those of another forward pass, which may round otherwise.

        Raises:
            RunError: Too many updates in a row had no finite gradient.
        """
        parts = _by_group(samples, self.recipe.algorithm.num_mini_batches)
        all_metrics = []
        with self.clock("train"):
            for update in range(self._num_updates):
                part = parts[update % len(parts)]
                weighed, denominators = weigh(
                    samples[part], self.algorithm, self._max_tokens, None if counts is None else counts[part]
                )
                if isinstance(self.algorithm, OnlineBlock):
                    stream = f"tokens of step {step}, update {update}"
                    weighed = with_selection(weighed, self.algorithm.loss, self.recipe.run.seed, stream)
                if update == 0:
                    weighed = [replace(sample, proximal_logprobs=None) for sample in weighed]
                shown = demonstrations[update % len(parts) :: len(parts)]
                weighed = mixed(weighed, shown, self._mu(step))
                all_metrics.append(self._update_once(weighed, denominators, step, update))
        metrics = over_updates(all_metrics) | ({"demonstrations/mu": self._mu(step)} if demonstrations else {})
        if self._kl.block.target is not None and step >= self._critic_steps:
            metrics |= self._kl.adapt(kl_of_sequences(samples), len(set(rollouts_of(samples).tolist())))
        return metrics

    def _mu(self, step: int) -> float:
        """The share of demonstrations in a step's loss."""
        mixture = self.algorithm.mixture if isinstance(self.algorithm, OnlineBlock) else None
        return 0.0 if mixture is None else mixture.mu(step)

    def _update_once(
        self, samples: Sequence[Sample], denominators: Denominators, step: int, update: int
    ) -> dict[str, Metric]:
        """forward_backward on every rank, then one optimizer step: of the policy, and of the critic beside it."""
        rates = {"trainer": self._learning_rate.of(step, update)} if step >= self._critic_steps else {}
        if "critic" in self._models and self.recipe.critic is not None:
            rates["critic"] = self.recipe.critic.learning_rate
        began = time.perf_counter()
        started = {
            name: self._models[name].start(
                Trainer.forward_backward, samples, self.algorithm, denominators, self._temperature
            )
            for name in rates
        }
        metrics: dict[str, Metric] = {}
        for under_way in started.values():
            metrics |= over_ranks(under_way.get())
        number, num_updates = self._learning_rate.number(step, update), self._learning_rate.num_updates
        done: list[UpdateStats] = []
        for name, rate in rates.items():
            stats = self._models[name].actors.call_all(Trainer.optim_step, rate, number, num_updates)[0]
            done.append(stats)
            metrics |= {
                f"{name}/grad_norm": Metric(stats.grad_norm),
                f"{name}/learning_rate": Metric(rate),
                f"{name}/skipped": Metric(float(stats.skipped)),
            }
        num_tokens = next(iter(started.values())).num_tokens
        metrics["perf/trained_tokens_per_s"] = Metric(num_tokens / (time.perf_counter() - began))
        self._count(done, step)
        return metrics

    def _count(self, done: Sequence[UpdateStats], step: int) -> None:
        """Counts what an update did: ``done`` of each model that is trained."""
        self.num_moves += not all(stats.skipped for stats in done)
        self.has_trained |= any(stats.grad_norm > 0 and math.isfinite(stats.grad_norm) for stats in done)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if any(stats.skipped for stats in done) else 0
        limit = self.recipe.run.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise RunError(
                f"step {step + 1}: the gradient was not finite for {limit} updates in a row; parameters are those of "
                "the last good step. Lower trainer.learning_rate, or look at the rollouts of these steps"
            )

    def evaluate(self, samples: Sequence[Sample]) -> Measured:
        """The objective's loss and metrics on samples that are not trained."""
        weighed, denominators = weigh(samples, self.algorithm, self._max_tokens)
        started = self._models["trainer"].start(
            Trainer.evaluate, weighed, self.algorithm, denominators, self._temperature
        )
        of_ranks = started.get()
        return Measured(sum(of_rank.loss for of_rank in of_ranks), over_ranks(of_rank.metrics for of_rank in of_ranks))

    def outputs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """What the head of a model of sequences says of each sample: float32, a number or [D]."""
        return self._models["trainer"].per_sequence(SequenceTrainer.outputs, samples)

    def weights(self, version: int, *, whole: bool = False) -> Reference:
        """A reference to the snapshot of the policy's weights, which will be version ``version``, once it is there.

        Args:
            whole: It is for workers that get weights in no other way.

        Raises:
            ActorFailure: A trainer could not gather them: which one.
        """
        with self.clock("sync"):
            gathered = self._models["trainer"].actors.start_all(Trainer.weights, version, whole)
            gathered.get(self._models["trainer"].actors.timeout_s)
            self._published = (version, self.num_moves)
            return gathered.refs[0]

    def weights_again(self) -> Reference | None:
        """A whole snapshot of the version that was asked for last; None where the parameters have moved on since."""
        version, num_moves = self._published
        return self.weights(version, whole=True) if num_moves == self.num_moves else None

    def release(self, model: str) -> None:
        """Ends the actors of a model that nobody will ask any more; their memory is free for others."""
        if model in self._models:
            self._models.pop(model).actors.kill()
            self._scorers = [scorer for scorer in self._scorers if scorer.model != model]

    def require_answers(self) -> None:
        """Raises ActorFailure when a trainer does not answer soon: it could not save either."""
        for ranks in self._trained():
            ranks.actors.start_all(Trainer.attention_cost).get(_ANSWER_S)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the learner beside the trainers' state."""
        return {"kl_coef": self._kl.coef, "has_trained": self.has_trained}

    def give_teacher_head(self) -> None:
        """Gives the trainers the teacher's head, where whole distributions are compared."""
        if any(scorer.field == "teacher_hidden" for scorer in self._scorers):
            teacher, trainer = self._models["teacher"].actors, self._models["trainer"].actors
            trainer.call_all(PolicyTrainer.take_teacher_head, teacher.start(0, TeacherModel.head))

    def save(self, directory: Path) -> None:
        """Writes every rank's state into a directory that exists."""
        for ranks, place in zip(self._trained(), (directory, directory / "critic"), strict=False):
            place.mkdir(exist_ok=True)
            ranks.actors.call_all(Trainer.save, place)

    def load(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Takes up what ``save`` and ``state`` gave."""
        for ranks, place in zip(self._trained(), (directory, directory / "critic"), strict=False):
            ranks.actors.call_all(Trainer.load, place)
        self._kl.coef = state["kl_coef"]
        # Checkpoints of an earlier version do not say.
        self.has_trained = state.get("has_trained", True)

    def export(self, directory: Path) -> None:
        """Writes the trained model, or its adapter, as others read it."""
        self._models["trainer"].actors.call_all(Trainer.export, directory)

    def _trained(self) -> list[ModelRanks[Any]]:
        """The policy's ranks, then the critic's where there is one."""
        return [self._models[name] for name in ("trainer", "critic") if name in self._models]


def _models(
    recipe: Recipe, attention_cost: float, groups: Mapping[str, ActorGroup[Any] | None]
) -> dict[str, ModelRanks[Any]]:
    return {
        name: ModelRanks(
            actors,
            max_tokens=recipe.trainer.tokens_per_micro_batch,
            unit_size=recipe.algorithm.learning.unit_size,
            # Those of frozen models never share tokens.
            share=1 if name in ("reference", "teacher") else recipe.trainer.sequence_parallel,
            attention_cost=attention_cost,
        )
        for name, actors in groups.items()
        if actors is not None
    }


def _by_group(samples: Sequence[Sample], num_parts: int) -> list[slice]:
    """The samples of each update: as many groups in each, in their order."""
    starts = [i for i, sample in enumerate(samples) if i == 0 or sample.group != samples[i - 1].group]
    per_part = len(starts) // num_parts
    edges = [*starts[:: max(1, per_part)][:num_parts], len(samples)]
    return [slice(start, end) for start, end in pairwise(edges)]
