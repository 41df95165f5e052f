"""A stage that samples: a model answers prompts, rewards score the answers, and what is good becomes rows.

    prompts --> pool ==== RolloutWorker xN, RewardServer xM --> groups --> rollouts/step_000001.parquet, one a step
    rollouts of all steps --> keep_answers --> final/rows.jsonl, which the stages behind it train on

Nothing is trained: workers load the model themselves, and there is no trainer. The seed of every answer comes from its
prompt's name, and a step's file is whole or not there: a stage that is resumed draws the steps that have none. With
``run.max_staleness: k`` workers go on with the k steps to come while a step is awaited.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlflow import checkpoint
from rlflow.data.kept_answers import Kept, keep_answers, require_condition
from rlflow.data.sampler import Sampler
from rlflow.driver.assemble import Batch, rollout_metrics, scored_group
from rlflow.driver.errors import GO_ON, RunError, StopRequested
from rlflow.driver.evaluation import Evaluator
from rlflow.driver.own_metrics import own_metrics
from rlflow.driver.pool import RolloutPool
from rlflow.driver.prepared_stage import PreparedStage
from rlflow.driver.resuming import length_of, whole_steps, write_recipe
from rlflow.driver.rollout_report import RolloutReport
from rlflow.driver.sampling import episode_limits, sample_seed
from rlflow.recipe import OnlineBlock, Recipe, SampleBlock
from rlflow.recipe.sample_blocks import ROWS_FILE
from rlflow.rewards.score_batch import ScoreBatch
from rlflow.tracking.episodes import Episode, Episodes
from rlflow.tracking.rollout_files import rollout_files
from rlflow.tracking.rollouts import RolloutFileError, RolloutState, read_rollouts, rollouts_path, write_rollouts
from rlflow.types import Group, GroupRequest, Prompt, StepStats

STATE: RolloutState = "sampled"
"""Of every rollout in a file."""
Arrived = dict[int, tuple[Group, ScoreBatch]]
"""By id of the request: what has come of it."""


class Sampling:
    """A stage that samples, and what it works with."""

    def __init__(self, stage: PreparedStage, pool: RolloutPool, evaluators: Sequence[Evaluator]) -> None:
        """
        Args:
            evaluators: Measured once, before the first step.
        """
        assert isinstance(stage.recipe.algorithm, SampleBlock)
        self.recipe, self.algorithm, self.directory = stage.recipe, stage.recipe.algorithm, stage.directory
        self.tracker, self.clock, self.callbacks = stage.tracker, stage.clock, stage.callbacks
        self.prompts: Sequence[Prompt] = stage.material.rows
        self.params = stage.params
        self.stage, self.pool, self.evaluators = stage, pool, evaluators
        self.step: int | None = None
        """The step under way, counted from 1; None before the first."""

    def run(self) -> None:
        """Draws the steps that are left and writes ``final/``.

        Raises:
            StopRequested: Somebody asked the stage to stop; what was drawn is kept.
            RunError: Too many answers could not be scored, or none is good.
        """
        self.pool.supply.version = 0
        resume = self.stage.resume
        first = whole_steps(self.directory) if resume else 0
        steps = self._draw()
        if resume:
            write_recipe(self.recipe, self.stage.inputs, self.directory)
            self.tracker.message(f"{first} of {len(steps)} steps were drawn before")
        if first == 0:
            found = [evaluator.run() for evaluator in self.evaluators]
            measured = {name: value for one in found for name, value in one.metrics.items()}
            start = StepStats(0, measured | self.clock.metrics())
            self.tracker.log(start)
            self.callbacks.step_ended(start)
        asked: dict[int, Arrived] = {}
        for step in range(first, len(steps)):
            self.step = step + 1
            ahead = range(step, min(step + self.recipe.run.max_staleness + 1, len(steps)))
            asked |= {later: self._ask(steps[later], later) for later in ahead if later not in asked}
            self._take(asked.pop(step), steps[step], step + 1)
            if step == first:
                self.tracker.message(self.clock.story(step + 1))
            if self.stage.stop.asked() and step + 1 < len(steps):
                raise StopRequested(f"stopped after step {step + 1} of {len(steps)}; {GO_ON}")
            if self.callbacks.is_asked_to_stop:
                self.tracker.message(f"a callback ends the stage after step {step + 1}")
                break
        with self.clock("export"):
            self.tracker.message(write_rows(self.directory, self.recipe))

    def notice(self) -> str:
        """What a stop waits for; empty when no step is under way."""
        if self.step is None:
            return ""
        left = f"with the answers of {self.step - 1} steps"
        return f"stopping after step {self.step}, waiting for its answers; Ctrl-C again stops at once, {left}"

    def _draw(self) -> list[list[tuple[int, int]]]:
        """(epoch, row) of the prompts of each step; the last may have fewer."""
        run, size = self.recipe.run, self.recipe.data.prompts_per_step
        sampler = Sampler(len(self.prompts), seed=run.seed, shuffle=self.recipe.data.shuffle)
        if run.steps is not None:
            return [sampler.take(size) for _ in range(run.steps)]
        assert run.epochs is not None
        drawn = sampler.take(max(1, math.ceil(run.epochs * len(self.prompts))))
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    def _ask(self, rows: Sequence[tuple[int, int]], step: int) -> Arrived:
        """Asks for the groups of a step, counted from 0; the ids of its requests are in the order of ``rows``."""
        arrived: Arrived = {}
        limits = episode_limits(self.recipe, self.params.max_new_tokens)
        seed, samples = self.recipe.run.seed, range(self.algorithm.group_size)

        def deliver(request: GroupRequest, group: Group, scores: ScoreBatch) -> None:
            arrived[request.id] = group, scores

        requests = [
            GroupRequest(
                self.pool.next_id(),
                self.prompts[row],
                tuple(sample_seed(seed, self.prompts[row].id, epoch, index) for index in samples),
                self.params,
                epoch,
                limits,
                labels=tuple(block.label for block in self.recipe.rewards),
                priority=(1, step, place),
                is_pinned=self.recipe.run.max_staleness == 0,
            )
            for place, (epoch, row) in enumerate(rows)
        ]
        self.pool.ask(requests, deliver)
        return arrived

    def _take(self, arrived: Arrived, rows: Sequence[tuple[int, int]], step: int) -> None:
        """Waits for a step's groups and writes them down, and what they look like."""
        size = len(rows)
        with self.clock("rollout"):
            self.pool.wait_until(
                lambda: len(arrived) == size, lambda: self.tracker.progress("generating", len(arrived), size)
            )
        report = RolloutReport()
        for group, scores in arrived.values():
            report.add(len(group.rollouts), scores)
        report.require_few_errors(self.recipe.reward_server.max_error_fraction)
        if report.failed:
            self.tracker.message(f"step {step}: {report.account}")
        neutral = OnlineBlock.model_construct(name=self.algorithm.name)
        in_order = [arrived[number] for number in sorted(arrived)]
        groups = [scored_group(group, scores, self.recipe.rewards, neutral) for group, scores in in_order]
        batch = Batch(groups, np.zeros(0), [])
        advantages = [np.full(len(group.rollouts), np.nan) for group in groups]
        drawn = self.directory / ".drawn.parquet"
        write_rollouts(drawn, groups, advantages, [STATE] * len(batch.rollouts))
        kept = keep_answers(read_rollouts(drawn, tokens=False), self.algorithm.keep)
        metrics = rollout_metrics(batch, 0) | own_metrics(self.recipe.metrics, groups)
        metrics |= report.metrics() | self.pool.metrics()
        metrics |= {"keep/good_fraction": kept.num_good / kept.num_answers, "keep/rows": float(len(kept.rows))}
        self.tracker.log(StepStats(step, metrics | self.clock.metrics()))
        self.tracker.episodes(Episodes(step, list(_episodes(groups))))
        # The file's name comes last: a step that has one is not drawn again.
        os.replace(drawn, rollouts_path(self.directory, step))
        self.callbacks.step_ended(StepStats(step, metrics))


def sample_stage(stage: PreparedStage) -> None:
    """Waits for the actors, samples, writes what is kept."""
    recipe = stage.recipe
    assert isinstance(recipe.algorithm, SampleBlock)
    columns = (name for prompt in stage.material.rows for name in prompt.columns)
    require_condition(recipe.algorithm.keep, [block.label for block in recipe.rewards], columns)
    with stage.clock("startup_actors"):
        stage.wait_ready()
    with stage.pool() as pool:
        assert pool is not None
        sampling = Sampling(stage, pool, stage.evaluators(None, pool))
        stage.callbacks.run_starts(recipe)
        with stage.stop.finishing_steps(sampling.notice):
            sampling.run()


def _episodes(groups: Sequence[Group]) -> Iterator[Episode]:
    """The rollouts for people to look at; nothing has an advantage."""
    for group in groups:
        for rollout in group.rollouts:
            yield Episode(group.prompt, rollout, math.nan, STATE)


def write_rows(directory: Path, recipe: Recipe) -> str:
    """Writes ``final/``, whole or not at all: what is kept of all rollouts. Returns what became of them.

    Raises:
        RunError: Nothing is kept.
    """
    assert isinstance(recipe.algorithm, SampleBlock)
    records = []
    try:
        for file in rollout_files(directory).values():
            records += read_rollouts(file, tokens=False, images=True)
    except RolloutFileError as error:
        raise RunError(f"{error}; without it, --resume draws the step anew") from error
    kept: Kept = keep_answers(records, recipe.algorithm.keep)
    if not kept.rows:
        raise RunError(
            f"{kept.account}; nothing is kept, and {directory} has no final/: look at its answers (rlflow inspect "
            f"{shlex.quote(str(directory))}), at algorithm.keep and at the rewards; --resume draws nothing again and "
            "keeps by what algorithm.keep says then"
        )

    def write(place: Path) -> None:
        text = "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in kept.rows)
        (place / Path(ROWS_FILE).name).write_text(text, encoding="utf-8", errors="replace")

    facts = {"step": len(rollout_files(directory)), "length": length_of(recipe), "rows": len(kept.rows)}
    final = checkpoint.publish_directory((directory / ROWS_FILE).parent, facts, write, checkpoint.FINAL_MANIFEST)
    return f"{kept.account}, in {final / Path(ROWS_FILE).name}"
