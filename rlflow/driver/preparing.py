"""What the loop of a stage works with: actors that are ready, the pool of those that generate, and what it measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rlflow.actor_groups import Actors
from rlflow.actors.reward_server import RewardServer
from rlflow.data.errors import Rows
from rlflow.data.vocabulary import token_table
from rlflow.driver.clock import Clock
from rlflow.driver.evaluation import Evaluator, LossEvaluator
from rlflow.driver.learner import Learner
from rlflow.driver.material import Material
from rlflow.driver.pass_evaluation import PassEvaluator
from rlflow.driver.pool import RolloutPool
from rlflow.driver.sampling import episode_limits
from rlflow.driver.scoring import Scoring
from rlflow.recipe import Recipe
from rlflow.tracking.tracker import Tracker
from rlflow.types import SamplingParams


@contextmanager
def pool_of(
    recipe: Recipe, actors: Actors, material: Material, tracker: Tracker, clock: Clock
) -> Iterator[RolloutPool | None]:
    """The pool of a stage, until its end; None where nobody generates."""
    if actors.rollout is None or actors.rewards is None:
        yield None
        return
    pool = RolloutPool(
        actors.rollout,
        Scoring(actors.rewards, recipe.scoring, clock.trace.add, tracker.message),
        recipe.rollout,
        tokenizer=material.tokenizer,
        is_token=token_table(material.tokenizer),
        startup_timeout_s=recipe.run.startup_timeout_s,
        tell=tracker.message,
        span=clock.trace.add,
    )
    try:
        yield pool
    finally:
        pool.close()


def evaluators_of(
    recipe: Recipe,
    learner: Learner | None,
    pool: RolloutPool | None,
    params: SamplingParams,
    held_out: Mapping[str, Rows],
    tracker: Tracker,
) -> list[Evaluator]:
    """The evaluators of a stage, one a set, in the recipe's order.

    Args:
        learner: None of a stage that trains nothing.
        pool: None where nobody generates.
        params: Of what is trained.
    """
    evaluators: list[Evaluator] = []
    for key, block in recipe.evaluations.items():
        reward, rows = recipe.reward_of(block), held_out[key]
        if reward is None:
            assert learner is not None, "a loss is of what is trained"
            evaluators.append(LossEvaluator(learner, block, rows))
            continue
        assert pool is not None
        limits = episode_limits(recipe, block.max_new_tokens or params.max_new_tokens)
        seed, is_pinned = recipe.run.seed, recipe.run.max_staleness == 0
        evaluators.append(PassEvaluator(pool, block, reward, rows, params, seed, tracker, limits, is_pinned=is_pinned))
    return evaluators


def wait_ready(actors: Actors, recipe: Recipe) -> None:
    """Waits until every actor has loaded what it needs, and the rewards have judged a first answer."""
    actors.wait_ready(recipe.run.startup_timeout_s)
    if actors.rewards:
        actors.rewards.call_all(RewardServer.self_check)
