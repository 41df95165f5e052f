"""A stage whose rows are read and whose actors are placed: what its loop begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlflow.actor_groups import Actors
from rlflow.actors.reward_server import RewardServer
from rlflow.data.vocabulary import token_table
from rlflow.driver.callbacks import Callbacks
from rlflow.driver.clock import Clock
from rlflow.driver.evaluation import Evaluator, LossEvaluator
from rlflow.driver.learner import Learner
from rlflow.driver.material import Material
from rlflow.driver.pass_evaluation import PassEvaluator
from rlflow.driver.pool import RolloutPool
from rlflow.driver.resuming import Inputs
from rlflow.driver.sampling import episode_limits, sampling_params
from rlflow.driver.scoring import Scoring
from rlflow.driver.stopping import StopSignals
from rlflow.recipe import Recipe
from rlflow.tracking.tracker import Tracker
from rlflow.types import SamplingParams


@dataclass(frozen=True, slots=True)
class PreparedStage:
    recipe: Recipe
    inputs: Inputs
    """What the recipe's names stand for."""
    directory: Path
    """Where it writes; it exists."""
    material: Material
    actors: Actors
    tracker: Tracker
    clock: Clock
    stop: StopSignals
    callbacks: Callbacks
    resume: bool
    num_restarts: int
    """How often it has begun again with fresh actors."""

    @property
    def params(self) -> SamplingParams:
        """How it generates, where it does."""
        return sampling_params(self.recipe, self.material.tokenizer, self.material.model)

    def wait_ready(self) -> None:
        """Waits until every actor has loaded what it needs, and the rewards have judged a first answer."""
        self.actors.wait_ready(self.recipe.run.startup_timeout_s)
        if self.actors.rewards:
            self.actors.rewards.call_all(RewardServer.self_check)
        for group in self.actors.groups():
            group.span = self.clock.trace.add

    @contextmanager
    def pool(self) -> Iterator[RolloutPool | None]:
        """Those that generate, until its end; None where nobody does."""
        recipe, actors, material = self.recipe, self.actors, self.material
        if actors.rollout is None or actors.rewards is None:
            yield None
            return
        pool = RolloutPool(
            actors.rollout,
            Scoring(actors.rewards, recipe.scoring, self.clock.trace.add, self.tracker.message),
            recipe.rollout,
            tokenizer=material.tokenizer,
            is_token=token_table(material.tokenizer),
            startup_timeout_s=recipe.run.startup_timeout_s,
            tell=self.tracker.message,
            span=self.clock.trace.add,
        )
        try:
            yield pool
        finally:
            pool.close()

    def evaluators(self, learner: Learner | None, pool: RolloutPool | None) -> list[Evaluator]:
        """One a held-out set, in the recipe's order.

        Args:
            learner: None of a stage that trains nothing.
            pool: None where nobody generates.
        """
        recipe, params = self.recipe, self.params
        evaluators: list[Evaluator] = []
        for key, block in recipe.evaluations.items():
            reward, rows = recipe.reward_of(block), self.material.held_out[key]
            if reward is None:
                assert learner is not None, "a loss is of what is trained"
                evaluators.append(LossEvaluator(learner, block, rows))
                continue
            assert pool is not None
            limits = episode_limits(recipe, block.max_new_tokens or params.max_new_tokens)
            seed, is_pinned = recipe.run.seed, recipe.run.max_staleness == 0
            evaluators.append(
                PassEvaluator(pool, block, reward, rows, params, seed, self.tracker, limits, is_pinned=is_pinned)
            )
        return evaluators
