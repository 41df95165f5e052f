"""The online loop: GRPO and its kin.

                 Prompt                    Group (unscored)            Group (scored)
    data/sampler ------> RolloutWorker xN ------------> RewardServer xM ---------+
                            ^                                                    v
                            | weights v+1                              RolloutPipeline (staleness <= k)
                            |                                                    v
                         publish <----- learner.update <----- advantages <----- learner.score
                                        (trainers, critic)                      (reference, trainer, critic)

    verb               waits for                          unblocked by
    pipeline.fill      nothing                            prompts of steps <= step + max_staleness are sent out
    pipeline.take      this step's generation, scoring    the workers, the reward servers
    learner.score      a forward pass of each scorer      the reference, the trainers, the critic
    learner.update     forward, backward, optimizer       every trainer rank
    publish            the workers' current call          the snapshot in the object store
    book.end_step      evaluation, a checkpoint           when they are due

With ``max_staleness: 0`` nothing overlaps and every token was sampled by the policy it trains. With k, k steps'
generation is under way while a step is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlflow.driver import assemble
from rlflow.driver.book import Book
from rlflow.driver.failures import keeping_rollouts, rollouts_path
from rlflow.driver.learner import Learner
from rlflow.driver.rollouts import Generation, RolloutPipeline
from rlflow.recipe import Recipe
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Prompt, StepStats


def train_online(
    recipe: Recipe,
    learner: Learner,
    book: Book,
    generation: Generation,
    prompts: Sequence[Prompt],
    num_steps: int,
    *,
    resume: bool,
) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last."""
    algorithm, rewards, rollout = recipe.algorithm, recipe.rewards, recipe.rollout
    pipeline = RolloutPipeline(
        recipe,
        generation,
        prompts,
        num_steps,
        lambda chunk: assemble.build_groups(chunk, rewards, algorithm.group_size, algorithm),
    )
    first = 0
    if resume:
        first, state = book.resume(num_steps)
        if first:
            pipeline.restore(first, state)
    generation.publish(learner.weights(first), first)
    if first == 0:
        book.report_start()
    with keeping_rollouts(book, pipeline):
        for step in range(first, num_steps):
            book.begin_step(step + 1)
            pipeline.fill(step)
            with learner.clock("rollout"):
                groups, metrics = pipeline.take(step)
            uncut = rollout.cut_by is None
            batch = assemble.assemble(groups, algorithm, rollout.max_new_tokens, engine_logprobs=uncut)
            metrics |= assemble.rollout_metrics(batch, step)
            samples = assemble.with_advantages(batch, learner.score(batch.samples), learner.algorithm)
            counts = batch.num_sampled_tokens if algorithm.groups.count_masked else None
            metrics |= learner.update(samples, step, counts)
            generation.publish(learner.weights(step + 1), step + 1)
            if step % recipe.run.log_rollouts_every == 0:
                path = rollouts_path(book.directory, step + 1)
                write_rollouts(path, batch.groups, assemble.rollout_advantages(batch, samples), batch.states)
            last = step + 1 == num_steps
            if book.end_step(StepStats(step + 1, metrics), pipeline.state(), last=last):
                break
