"""The online loop: GRPO and its kin.

                prompts                       whole scored groups              samples
    sampler ------------> window ---------------------------> learner.score ------> learner.update --+
                          |   ^                               (reference, trainer,  (trainers,       |
                   leases |   | groups                         critic: by name)      critic)         | weights v+1
                          v   |                                                                      v
                         pool ==== RolloutWorker xN, RewardServer xM <=========== publish(v+1) ------+

    verb               waits for                          unblocked by
    window.release     nothing                            the groups of steps <= step + max_staleness are asked for
    window.take        this step's groups                 workers and reward servers, a group at a time
    learner.score      a forward pass of each scorer      the reference, the trainers, the critic
    learner.update     forward, backward, optimizer       every trainer rank
    learner.weights    every trainer rank                 the snapshot in the object store
    book.settle        an evaluation that is under way    workers and reward servers
    pool.publish       nothing                            each worker takes it between two decode steps
    book.end_step      evaluation, a checkpoint           when they are due; with k > 0 an evaluation is only asked for

With ``max_staleness: 0`` nothing overlaps and every token was sampled by the policy it trains. With k, workers generate
for the k steps to come while a step is trained, and go on with new weights in the middle of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlflow.driver import assemble
from rlflow.driver.book import Book
from rlflow.driver.demonstrations import demonstrations_of
from rlflow.driver.failures import keeping_rollouts
from rlflow.driver.learner import Learner
from rlflow.driver.own_metrics import own_metrics
from rlflow.driver.window import Window
from rlflow.recipe import Recipe
from rlflow.tracking.rollouts import rollouts_path, write_rollouts
from rlflow.types import Sample, StepStats


def train_online(
    recipe: Recipe,
    learner: Learner,
    book: Book,
    window: Window,
    num_steps: int,
    *,
    resume: bool,
    demonstrations: Sequence[Sample] = (),
) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last.

    Args:
        demonstrations: Trained beside the rollouts, where the recipe has such.
    """
    algorithm, pool = recipe.online, window.pool
    first = 0
    if resume:
        first, state = book.resume(num_steps)
        if first:
            window.restore(first, state)
    pool.publish(learner.weights(first), first)
    if first == 0:
        book.report_start()
    book.settle()
    with keeping_rollouts(book, window):
        for step in range(first, num_steps):
            book.begin_step(step + 1)
            window.release(step)
            with learner.clock("rollout"):
                groups, metrics = window.take(step)
            # No engine has drawn the data's answers.
            uncut = recipe.cut_by is None and not recipe.trains_answers
            batch = assemble.assemble(groups, algorithm, recipe.max_completion_tokens, engine_logprobs=uncut)
            metrics |= assemble.rollout_metrics(batch, step) | own_metrics(recipe.metrics, batch.groups)
            samples = assemble.with_advantages(batch, learner.score(batch.samples), learner.online)
            counts = batch.num_sampled_tokens if algorithm.groups.count_masked else None
            metrics |= learner.update(samples, step, counts, demonstrations_of(step, demonstrations, recipe))
            book.settle()
            last = step + 1 == num_steps
            # What is measured while the next step is trained must be there for workers that are started meanwhile.
            whole = book.evaluates_after(step + 1, last=last)
            pool.publish(learner.weights(step + 1, whole=whole), step + 1)
            advantages = assemble.rollout_advantages(batch, samples, algorithm)
            book.tracker.episodes(assemble.episodes(batch, advantages, step + 1))
            if step % recipe.run.log_rollouts_every == 0:
                write_rollouts(rollouts_path(book.directory, step + 1), batch.groups, advantages, batch.states)
            if book.end_step(StepStats(step + 1, metrics), window.state(), last=last):
                break
