"""The offline loop: SFT, preference losses, reward models. The trainer verbs and the batching of the online loop.

data/sampler --units--> with_reference --> make_batch --> batching --> PolicyTrainer xR
                               ^                                       or RewardTrainer xR
                        ReferenceModel xR

verb             waits for                                    consumes -> produces
with_reference   the reference, unless it was precomputed     units -> units with ref_logprobs
make_batch       a forward pass (kto, aot*), else nothing     units -> samples with margins, weights; counts
update           every trainer rank                           samples -> metrics

``reference.precompute`` scores every row once, before the first step, of a resumed run too; otherwise a row is scored
whenever it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlflow.data.sampler import Sampler
from rlflow.driver import learner
from rlflow.driver.stage import Stage
from rlflow.driver.units import Unit, make_batch, with_reference
from rlflow.types import StepStats


def train_offline(stage: Stage, units: Sequence[Unit], num_steps: int, *, resume: bool) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last."""
    recipe = stage.recipe
    sampler = Sampler(len(units), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
    first = 0
    if resume:
        first, state = stage.resume(num_steps)
        if first:
            sampler.restore(state["sampler"])
    if recipe.needs_reference and recipe.reference.precompute:
        units = precompute_reference(stage, units)
    if first == 0:
        stage.sync_weights(0)
        stage.report_start()
    for step in range(first, num_steps):
        stage.begin_step(step + 1)
        chosen = [units[index] for _, index in sampler.take(recipe.data.prompts_per_step)]
        with stage.clock("reference"):
            chosen = with_reference(stage, chosen)
        with stage.clock("train"):
            samples, denominators = make_batch(stage, chosen)
            learning_rate = stage.learning_rate(step, num_steps)
            metrics = learner.update(stage, samples, denominators, learning_rate=learning_rate)
        stage.count_skipped(metrics, step + 1)
        last = step + 1 == num_steps
        if stage.evaluates_after(step + 1, last=last):
            stage.sync_weights(step + 1)
        if stage.end_step(StepStats(step + 1, metrics), {"sampler": sampler.state()}, last=last):
            break


def precompute_reference(stage: Stage, units: Sequence[Unit]) -> list[Unit]:
    """Scores all rows, the held-out ones too, and ends the reference actors where there are any."""
    chunk = stage.recipe.data.prompts_per_step
    scored: list[Unit] = []
    with stage.clock("reference"):
        for start in range(0, len(units), chunk):
            stage.tracker.progress("reference logprobs", start, len(units))
            scored += with_reference(stage, units[start : start + chunk])
        if stage.evaluator is not None:
            stage.evaluator.prepare()
    if stage.actors.reference is not None:
        stage.actors.release_reference()
    return scored
