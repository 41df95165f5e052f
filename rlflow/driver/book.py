"""The book of a run: its directory, what is measured and logged, when a checkpoint is written, when it is over.

begin_step(step)                  from now on a stop waits for the step's end
end_step(stats, state, last)      evaluate -> log -> checkpoint (when it is due, at the end, when asked to stop)
settle()                          what is evaluated while the next step is trained -> log, the best checkpoint
resume(num_steps)                 the newest valid checkpoint -> steps done, the loop's state
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow import checkpoint
from rlflow.driver.args_json import write_args
from rlflow.driver.errors import GO_ON, RunError, StopRequested
from rlflow.driver.evaluation import Evaluation, Evaluator, UnderWay
from rlflow.driver.learner import Learner
from rlflow.driver.prepared_stage import PreparedStage
from rlflow.driver.resuming import lasts_longer, length_of, sum_of_measure, write_recipe
from rlflow.driver.saving import EndedStep, SaveSchedule
from rlflow.driver.untrained import why_nothing_was_trained
from rlflow.tracking.spans import busy_metrics, write_trace
from rlflow.types import StepStats


class Book:
    def __init__(self, stage: PreparedStage, learner: Learner, evaluators: Sequence[Evaluator]) -> None:
        """
        Args:
            evaluators: The score of the first decides which checkpoint is best, and when the score is reached.
        """
        self.recipe, self.inputs, self.directory = stage.recipe, stage.inputs, stage.directory
        self.learner, self.evaluators = learner, list(evaluators)
        self.tracker, self.clock, self.should_stop = stage.tracker, stage.clock, stage.stop.asked
        self.callbacks = stage.callbacks
        self.checkpoints = stage.directory / "checkpoints"
        self.step: int | None = None
        """The step under way, counted from 1; None before the first of this process."""
        self.unsaved: EndedStep | None = None
        """The step that ended last, until a checkpoint holds it."""
        self._last_metrics: Mapping[str, float] = {}
        """Of the step that ended last, in this process."""
        self._best = -math.inf
        self._under_way: UnderWay | None = None
        self._schedule = SaveSchedule(stage.recipe.run)
        self._measure = sum_of_measure(stage.recipe, stage.inputs)
        self._is_startup_told = False
        self._step_began = time.time()
        self._restarts = {"fleet/stage_restarts": float(stage.num_restarts)} if stage.num_restarts else {}

    def resume(self, num_steps: int) -> tuple[int, dict[str, Any]]:
        """Loads the newest valid checkpoint. Returns how many steps are done and the loop's saved state.

        All ``num_steps`` are done where the evaluation ended the run before, and the recipe asks for no more.
        """
        path = checkpoint.newest_valid(self.checkpoints, self.tracker.message)
        if path is None:
            write_recipe(self.recipe, self.inputs, self.directory)
            self.tracker.message("there is nothing to resume: starts at step 1")
            return 0, {}
        state = checkpoint.read_driver_state(path)
        self.learner.load(path, state)
        if state["best"] is not None and state.get("measure", self._measure) == self._measure:
            self._best = state["best"]
        elif state["best"] is not None:
            self.tracker.message("the evaluation is another one: the best checkpoint is looked for anew")
        if owed := state.get("unmeasured"):
            evaluators = [one for one in self.evaluators if one.block.name in owed["names"]]
            self._under_way = UnderWay(state["step"], evaluators, owed["metrics"], owed["metrics"], path)
        write_recipe(self.recipe, self.inputs, self.directory)
        is_over = state.get("ended") is not None and not lasts_longer(state["ended"], self.recipe)
        self.tracker.message(f"resumed from {path.name}")
        return num_steps if is_over else state["step"], state

    def report_start(self) -> None:
        """Evaluates and logs what the policy is before the first step."""
        evaluation = self._evaluate(self.evaluators)
        measured = {} if evaluation is None else evaluation.metrics
        stats = StepStats(0, measured | self.clock.metrics())
        self.tracker.log(stats)
        self.callbacks.step_ended(stats)

    def begin_step(self, step: int) -> None:
        """From now on a stop waits for the end of ``step``, counted from 1."""
        self.step = step

    def evaluates_after(self, step: int, *, last: bool) -> bool:
        """Whether the end of a step measures."""
        return bool(self._due(step, last=last))

    def _due(self, step: int, *, last: bool) -> list[Evaluator]:
        """Those that measure at the end of a step."""
        return [one for one in self.evaluators if last or (one.block.every and step % one.block.every == 0)]

    def end_step(self, stats: StepStats, state: dict[str, Any], *, last: bool) -> bool:
        """Evaluates and saves when it is due, after the last step and when asked to stop; logs.

        Args:
            state: What the loop needs to go on from here.

        Returns:
            Whether the run is over: it was the last step, the evaluation reached ``run.stop_at_score``, or a callback
            asked for it.

        Raises:
            StopRequested: Somebody asked the run to stop, and the checkpoint is written.
        """
        due = self._due(stats.step, last=last)
        is_beside = self._goes_beside(last)
        evaluation = None if is_beside else self._evaluate(due)
        if evaluation is not None:
            stats.metrics |= evaluation.metrics
            if not last and self._is_reached(evaluation):
                last = True
                rest = self._evaluate([one for one in self.evaluators if one not in due])
                stats.metrics |= {} if rest is None else rest.metrics
        if not self._is_startup_told:
            self.tracker.message(self.clock.story(stats.step))
            self._is_startup_told = True
        stats.metrics |= self.clock.metrics() | self._trace(stats.step) | self._restarts
        self.tracker.log(stats)
        self._last_metrics = stats.metrics
        score = None if evaluation is None else evaluation.score
        if is_beside and due:
            self._begin(due, stats)
        self.unsaved = self._ended(stats.step, state, score, last=last)
        self.callbacks.step_ended(stats)
        if self.callbacks.is_asked_to_stop and not last:
            self.tracker.message(f"a callback ends the stage after step {stats.step}")
            last, measured = True, self.settle()
            score = score if measured is None else measured.score
            self.unsaved = self._ended(stats.step, state, score, last=True)
        stopping = self.should_stop() and not last
        # After the log: a resumed run cuts the log back to its checkpoint, so a checkpoint must not run ahead of it.
        if last or stopping or self._schedule.is_due(stats.step):
            self.save(self.unsaved)
        if stopping:
            raise StopRequested(f"stopped after step {stats.step}; {GO_ON}")
        return last

    def settle(self) -> Evaluation | None:
        """Waits for what is evaluated while a step is trained: before the workers have newer weights. Logs it with the
        step whose weights it measured, and takes its score into account."""
        under_way, self._under_way = self._under_way, None
        evaluation = None if under_way is None else self._evaluate(under_way.evaluators)
        if under_way is None or evaluation is None:
            return None
        stats = StepStats(under_way.step, {**under_way.logged, **evaluation.metrics})
        self.tracker.log(stats)
        self.callbacks.evaluated(stats)
        if under_way.checkpoint is not None and evaluation.score is not None and evaluation.score > self._best:
            self._best = evaluation.score
            checkpoint.link(self.checkpoints, "best", under_way.checkpoint)
        return evaluation

    def _goes_beside(self, last: bool) -> bool:
        """Whether what is evaluated after a step may go on while the next is trained: nobody waits for its score."""
        is_awaited = last or self.recipe.run.stop_at_score is not None or self.should_stop()
        return self.recipe.run.max_staleness > 0 and not is_awaited

    def _begin(self, evaluators: Sequence[Evaluator], stats: StepStats) -> None:
        for evaluator in evaluators:
            evaluator.begin()
        self._under_way = UnderWay(stats.step, evaluators, dict(stats.metrics), {})

    def _is_reached(self, evaluation: Evaluation) -> bool:
        """Whether the stage has the score that it is to end with."""
        target, score = self.recipe.run.stop_at_score, evaluation.score
        return target is not None and score is not None and score >= target

    def _ended(self, step: int, state: dict[str, Any], score: float | None, *, last: bool) -> EndedStep:
        """What the checkpoint of a step that has just ended says."""
        own_state = {"step": step, **self.learner.state()}
        if self._under_way is not None:
            names = [evaluator.block.name for evaluator in self._under_way.evaluators]
            own_state["unmeasured"] = {"names": names, "metrics": self._under_way.of_step}
        ended = {"measure": self._measure, "ended": length_of(self.recipe) if last else None}
        return EndedStep(step, {**own_state, **ended, **state}, score, self.learner.num_moves)

    def save(self, ended: EndedStep) -> None:
        """Writes the checkpoint of the step that has just ended, and forgets the oldest."""
        improved = ended.score is not None and ended.score > self._best
        if ended.score is not None:
            self._best = max(self._best, ended.score)
        best = self._best if math.isfinite(self._best) else None
        with self.clock("save"):
            path = checkpoint.publish(self.checkpoints, ended.step, {**ended.state, "best": best}, self._write)
        self.unsaved = None
        if self._under_way is not None and self._under_way.step == ended.step:
            self._under_way.checkpoint = path
        self._schedule.saved()
        if improved:
            checkpoint.link(self.checkpoints, "best", path)
        checkpoint.prune(self.checkpoints, self.recipe.run.keep_checkpoints)
        self.callbacks.checkpoint_written(ended.step, path)

    def _write(self, directory: Path) -> None:
        """Fills a checkpoint's directory."""
        self.learner.save(directory)
        write_args(directory, self.recipe, self.directory)

    def require_trained(self) -> None:
        """Raises RunError when the gradient of every update was zero or not finite: the model is what it was."""
        if not self.learner.has_trained:
            raise RunError(
                f"nothing was trained, and {self.directory} has no final/: the gradient of every update was 0 or not "
                f"finite. {why_nothing_was_trained(self.recipe, self._last_metrics)}"
            )

    def _trace(self, step: int) -> dict[str, float]:
        """Writes what every actor did in a step whose rollouts are kept too. Returns how busy each role was."""
        spans, began, ended = self.clock.trace.take(), self._step_began, time.time()
        self._step_began = ended
        if (step - 1) % self.recipe.run.log_rollouts_every == 0:
            write_trace(self.directory / "traces" / f"step_{step:06d}.json", spans)
        return busy_metrics(spans, began, ended)

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> Evaluation | None:
        """Measures the weights that the workers have, one set after the other."""
        if not evaluators:
            return None
        with self.clock("evaluate"):
            found = [one.run() for one in evaluators]
        metrics = {name: value for one in found for name, value in one.metrics.items()}
        return Evaluation(metrics, found[0].score if evaluators[0] is self.evaluators[0] else None)
