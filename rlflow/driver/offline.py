"""The offline loop: SFT and its kin. The same trainer verbs and the same batching as online, without rollouts.

data/sampler --Example--> samples --> batching --> PolicyTrainer xR --> (weights to the workers when they evaluate)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlflow.data.examples import Example
from rlflow.data.sampler import Sampler
from rlflow.driver import assemble, learner
from rlflow.driver.stage import Stage
from rlflow.types import Sample, StepStats


def train_offline(stage: Stage, examples: Sequence[Example], num_steps: int, *, resume: bool) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last."""
    recipe = stage.recipe
    sampler = Sampler(len(examples), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
    first = 0
    if resume:
        first, state = stage.resume()
        if first:
            sampler.restore(state["sampler"])
    if first == 0:
        stage.sync_weights(0)
        stage.report_start()
    for step in range(first, num_steps):
        stats = StepStats(step + 1)
        chosen = [examples[index] for _, index in sampler.take(recipe.data.prompts_per_step)]
        samples, denominators = assemble.weigh(
            [_sample(e) for e in chosen], 1, recipe.algorithm, recipe.data.max_tokens
        )
        with stage.clock("train"):
            stats.metrics = learner.update(
                stage,
                samples,
                denominators,
                learning_rate=stage.learning_rate(step, num_steps),
                temperature=1.0,
            )
        stage.count_skipped(bool(stats.metrics["trainer/skipped"]), step + 1)
        last = step + 1 == num_steps
        if stage.evaluates_after(step + 1, last=last):
            stage.sync_weights(step + 1)
        if stage.end_step(stats, {"sampler": sampler.state()}, last=last):
            break


def _sample(example: Example) -> Sample:
    return Sample(
        token_ids=example.token_ids,
        loss_mask=example.loss_mask,
        loss_weights=np.zeros(len(example.token_ids), dtype=np.float32),
    )
