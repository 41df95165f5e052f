"""The online loop: GRPO and its kin.

                 Prompt                    Group (unscored)            Group (scored)
    data/sampler ------> RolloutWorker xN ------------> RewardServer xM ---------+
                            ^                                                    v
                            | weights v+1                              RolloutPipeline (staleness <= k)
                            |                                                    v
                        weight sync <--- PolicyTrainer xR <--- batching <--- advantages (+ ref_logprobs, values)
                                         ValueTrainer xR (ppo)

    verb               waits for                          unblocked by
    pipeline.fill      nothing                            prompts of steps <= step + max_staleness are sent out
    pipeline.take      this step's generation, scoring    the workers, the reward servers
    learn              forward, backward, optimizer       every trainer rank
    sync_weights       the workers' current call          the snapshot in the object store

With ``max_staleness: 0`` nothing overlaps and every token was sampled by the policy it trains. With k, k steps'
generation is under way while a step is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlflow.driver import assemble, learner
from rlflow.driver.rollouts import RolloutPipeline
from rlflow.driver.saving import keeping_rollouts, rollouts_path
from rlflow.driver.stage import Stage
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Prompt, Sample, StepStats


def train_online(stage: Stage, prompts: Sequence[Prompt], num_steps: int, *, resume: bool) -> None:
    """Runs the steps that are left and leaves a checkpoint after the last."""
    algorithm, rewards = stage.recipe.algorithm, stage.recipe.rewards
    pipeline = RolloutPipeline(
        stage, prompts, num_steps, lambda chunk: assemble.build_groups(chunk, rewards, algorithm.group_size, algorithm)
    )
    first = 0
    if resume:
        first, state = stage.resume(num_steps)
        if first:
            pipeline.restore(first, state)
    stage.sync_weights(first)
    if first == 0:
        stage.report_start()
    with keeping_rollouts(stage, pipeline):
        for step in range(first, num_steps):
            stage.begin_step(step + 1)
            stats = StepStats(step + 1)
            pipeline.fill(step)
            with stage.clock("rollout"):
                groups, stats.metrics = pipeline.take(step)
            rollout = stage.recipe.rollout
            uncut = rollout.cut_by is None
            batch = assemble.assemble(groups, algorithm, rollout.max_new_tokens, engine_logprobs=uncut)
            stats.metrics |= assemble.rollout_metrics(batch, step)
            samples, metrics = learn(stage, batch, step, num_steps)
            stats.metrics |= metrics
            stage.sync_weights(step + 1)
            if step % stage.recipe.run.log_rollouts_every == 0:
                path = rollouts_path(stage.directory, step + 1)
                write_rollouts(path, batch.groups, assemble.rollout_advantages(batch, samples), batch.states)
            if stage.end_step(stats, pipeline.state(), last=step + 1 == num_steps):
                break


def learn(stage: Stage, batch: assemble.Batch, step: int, num_steps: int) -> tuple[list[Sample], dict[str, float]]:
    """Trains on one rollout batch: ``epochs_per_step`` passes of ``updates_per_step`` optimizer updates.

    Returns:
        The samples as they were trained, and the updates' metrics: their mean, but the engine's mismatch is of the
        first update, before the policy moved. That update's ratio is 1 to the bit: its denominator is its own logprobs,
        not those of another forward pass, which may round otherwise.
    """
    algorithm, rollout = stage.algorithm, stage.recipe.rollout
    blocks = algorithm.groups
    updates = blocks.updates_per_step * blocks.epochs_per_step
    samples = score_samples(stage, batch, updates)
    lengths = batch.num_sampled_tokens if blocks.count_masked else None
    warmup = algorithm.critic.warmup_steps if stage.recipe.needs_critic else 0
    all_metrics: list[dict[str, float]] = []
    per_update = len(samples) // blocks.updates_per_step
    with stage.clock("train"):
        for update in range(updates):
            start = update % blocks.updates_per_step * per_update
            part = slice(start, start + per_update)
            weighed, denominators = assemble.weigh(
                samples[part],
                algorithm.group_size,
                algorithm,
                rollout.max_new_tokens,
                counts=None if lengths is None else lengths[part],
            )
            metrics = learner.update(
                stage,
                weighed if update else [replace(sample, proximal_logprobs=None) for sample in weighed],
                denominators,
                learning_rate=stage.learning_rate(
                    max(0, step - warmup) * updates + update, (num_steps - warmup) * updates, updates
                ),
                temperature=rollout.temperature,
                critic_only=step < warmup,
            )
            stage.count_skipped(metrics, step + 1)
            all_metrics.append(metrics)
    metrics = {name: over_updates(name, [m[name] for m in all_metrics]) for name in all_metrics[0]}
    metrics |= {name: value for name, value in all_metrics[0].items() if name.startswith("mismatch/")}
    if algorithm.kl.target is not None and step >= warmup:
        metrics |= stage.adapt_kl(assemble.kl_of_sequences(samples), len(samples))
    return samples, metrics


def over_updates(name: str, values: Sequence[float]) -> float:
    """Their mean, or the largest where the name says so."""
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def score_samples(stage: Stage, batch: assemble.Batch, num_updates: int) -> list[Sample]:
    """The batch's samples with what the models say of them, as far as the algorithm needs it, and their advantages.

    The trainer's own logprobs of before the first update take a forward pass: for the ratio of later updates, and for a
    KL in the reward or with a target where the engine's are of another distribution.
    """
    algorithm, temperature = stage.algorithm, stage.recipe.rollout.temperature
    samples = batch.samples
    if stage.recipe.needs_reference:
        with stage.clock("reference"):
            samples = learner.with_reference(stage, samples, temperature)
    later_ratios = algorithm.correction.old_policy == "trainer" and num_updates > 1
    if later_ratios or (stage.recipe.rollout.cut_by is not None and algorithm.kl.needs_policy_logprobs):
        with stage.clock("proximal"):
            samples = learner.with_proximal(stage, samples, temperature)
    if stage.recipe.needs_critic:
        with stage.clock("values"):
            samples = learner.with_values(stage, samples)
    return assemble.with_advantages(batch, samples, algorithm)
