"""The offline loop: SFT, preference losses, reward models. The learner and the book of the online loop.

    data/sampler --units--> learner.score --> with_targets --> learner.update --> book.end_step

    verb             waits for                                    consumes -> produces
    learner.score    the reference, unless it was precomputed     units -> units with ref_logprobs
    with_targets     a forward pass (kto, aot*), else nothing     units -> samples with what the loss compares with
    learner.update   every trainer rank                           samples -> metrics

``reference.precompute`` scores every row once, before the first step, of a resumed run too; otherwise a row is scored
whenever it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlflow.algorithms.batch_targets import Unit, with_targets
from rlflow.data.sampler import Sampler
from rlflow.driver.book import Book
from rlflow.driver.learner import Learner
from rlflow.driver.pool import RolloutPool
from rlflow.driver.units import score_units
from rlflow.recipe import Recipe
from rlflow.types import StepStats


def train_offline(
    recipe: Recipe,
    learner: Learner,
    book: Book,
    pool: RolloutPool | None,
    units: Sequence[Unit],
    num_steps: int,
    *,
    resume: bool,
) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last.

    Args:
        pool: Where the evaluation generates.
    """
    sampler = Sampler(len(units), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
    first = 0
    if resume:
        first, state = book.resume(num_steps)
        if first:
            sampler.restore(state["sampler"])
    if recipe.needs_reference and recipe.reference.precompute:
        units = precompute_reference(learner, book, units, recipe.data.prompts_per_step)
    if first == 0:
        if pool is not None:
            pool.publish(learner.weights(0), 0)
        book.report_start()
    for step in range(first, num_steps):
        book.begin_step(step + 1)
        chosen = [units[index] for _, index in sampler.take(recipe.data.prompts_per_step)]
        scored = score_units(learner, chosen)
        with learner.clock("train"):
            samples = with_targets(scored, learner.algorithm, learner.logprobs)
        metrics = learner.update(samples, step)
        last = step + 1 == num_steps
        if pool is not None and book.evaluates_after(step + 1, last=last):
            pool.publish(learner.weights(step + 1), step + 1)
        if book.end_step(StepStats(step + 1, metrics), {"sampler": sampler.state()}, last=last):
            break


def precompute_reference(learner: Learner, book: Book, units: Sequence[Unit], chunk: int) -> list[Unit]:
    """Scores all rows, ``chunk`` at a time, the held-out ones too, and ends the reference's actors if it has any."""
    scored: list[Unit] = []
    for start in range(0, len(units), chunk):
        book.tracker.progress("reference logprobs", start, len(units))
        scored += score_units(learner, units[start : start + chunk])
    for evaluator in book.evaluators:
        evaluator.prepare()
    learner.release("reference")
    return scored
