"""What both loops share: the actors of a stage, its directory, the current weights, saving, evaluating, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow import checkpoint
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.trainer import Trainer
from rlflow.algorithms.kl_reward import adapt_kl_coef
from rlflow.data.tokenizer import save_tokenizer, stop_token_ids, write_stop_tokens
from rlflow.driver.clock import Clock
from rlflow.driver.errors import RunError, StopRequested
from rlflow.driver.resuming import Inputs, lasts_longer, length_of, sum_of_measure, write_recipe
from rlflow.driver.saving import EndedStep, SaveSchedule, save_trainers
from rlflow.placement import Actors
from rlflow.recipe import AlgorithmBlock, ModelBlock, Recipe
from rlflow.tracking.model_card import write_card
from rlflow.tracking.tracker import Tracker, Trackers
from rlflow.types import SamplingParams, StepStats

if TYPE_CHECKING:
    from rlflow.driver.evaluation import Evaluator


@dataclass(slots=True)
class Stage:
    recipe: Recipe
    directory: Path
    model: ModelBlock
    """The recipe's, with a path that exists."""
    tokenizer: Any
    actors: Actors
    should_stop: Callable[[], bool]
    """Whether somebody asked the run to end."""
    clock: Clock
    tracker: Tracker = field(default_factory=Trackers)
    evaluator: Evaluator | None = None
    best: float = -math.inf
    inputs: Inputs = field(default_factory=lambda: Inputs({}, {}, {}))
    """What the recipe's names stand for."""
    step: int | None = None
    """The step under way, counted from 1; None before the first of this process."""
    unsaved: EndedStep | None = None
    """The step that ended last, until a checkpoint holds it."""
    has_moved: bool = False
    """Parameters have changed since that step ended."""
    schedule: SaveSchedule = field(init=False)
    skipped_in_a_row: int = 0
    has_trained: bool = False
    """Whether any update had a gradient."""
    startup_told: bool = False
    attention_cost: float = 0.0
    """Of the trainer's model, once it is loaded."""
    kl_coef: float | None = None
    """Of the KL to the reference, once it has adapted."""
    version: int = 0
    """Of the weights that the rollout workers were given last."""

    def __post_init__(self) -> None:
        self.schedule = SaveSchedule(self.recipe.run)

    @property
    def algorithm(self) -> AlgorithmBlock:
        """The recipe's, with the KL coefficient of this step."""
        algorithm = self.recipe.algorithm
        if self.kl_coef is None:
            return algorithm
        return algorithm.model_copy(update={"kl": algorithm.kl.model_copy(update={"coef": self.kl_coef})})

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def sampling_params(self) -> SamplingParams:
        rollout = self.recipe.rollout
        return SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=stop_token_ids(self.tokenizer, self.model),
        )

    def sync_weights(self, version: int) -> None:
        """Gives the trainer's weights to every rollout worker; they are version ``version`` from then on."""
        if self.actors.rollout is None:
            return
        trainer = self.actors.trainer
        self.version = version
        with self.clock("sync"):
            gathered = trainer.start_all(Trainer.weights, version)
            self.actors.rollout.call_all(RolloutWorker.load_weights, gathered.refs[0])

    def learning_rate(self, update: int, num_updates: int, updates_per_step: int = 1) -> float:
        """The schedule's value for update ``update`` of ``num_updates``, counted from 0."""
        trainer = self.recipe.trainer
        warmup = trainer.warmup_steps * updates_per_step
        if update < warmup:
            return trainer.learning_rate * (update + 1) / warmup
        done = (update - warmup) / max(1, num_updates - warmup)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return trainer.learning_rate * factor[trainer.schedule]

    def count_skipped(self, metrics: Mapping[str, float], step: int) -> None:
        """Counts what an update did. Raises RunError when too many in a row had no finite gradient."""
        skipped = [bool(value) for name, value in metrics.items() if name.endswith("/skipped")]
        self.has_moved |= not all(skipped)
        self.has_trained |= any(
            value > 0 and math.isfinite(value) for name, value in metrics.items() if name.endswith("/grad_norm")
        )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if any(skipped) else 0
        limit = self.recipe.run.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise RunError(
                f"step {step}: the gradient was not finite for {limit} updates in a row; parameters are those of the "
                "last good step. Lower trainer.learning_rate, or look at the rollouts of these steps"
            )

    def require_trained(self) -> None:
        """Raises RunError when the gradient of every update was zero or not finite: the model is what it was."""
        if not self.has_trained:
            raise RunError(
                f"nothing was trained, and {self.directory} has no final/: the gradient of every update was 0 or not "
                "finite. Online, no group had two different rewards: look at rollouts/ and at the reward functions, or "
                "start from a model that is right at times; offline, no token was trained: look at data.loss_on"
            )

    def adapt_kl(self, kl: float, num_samples: int) -> dict[str, float]:
        """Moves the KL coefficient of the next step towards ``kl.target``. Returns this step's metrics."""
        block = self.algorithm.kl
        assert block.target is not None
        self.kl_coef = adapt_kl_coef(block.coef, kl, block.target, block.horizon, num_samples)
        return {"kl/coef": block.coef, "kl/sequence": kl}

    def resume(self, num_steps: int) -> tuple[int, dict[str, Any]]:
        """Loads the newest valid checkpoint. Returns how many steps are done and the driver's saved state.

        All ``num_steps`` are done where the evaluation ended the stage before, and the recipe asks for no more.
        """
        path = checkpoint.newest_valid(self.checkpoints, self.tracker.message)
        if path is None:
            write_recipe(self.recipe, self.inputs, self.directory)
            self.tracker.message("there is nothing to resume: starts at step 1")
            return 0, {}
        self.actors.trainer.call_all(Trainer.load, path)
        if self.actors.critic is not None:
            self.actors.critic.call_all(Trainer.load, path / "critic")
        state = checkpoint.read_driver_state(path)
        self.kl_coef = state["kl_coef"]
        # Checkpoints of an earlier version do not say.
        self.has_trained = state.get("has_trained", True)
        if state["best"] is not None and state.get("measure", self._measure) == self._measure:
            self.best = state["best"]
        elif state["best"] is not None:
            self.tracker.message("the evaluation is another one: the best checkpoint is looked for anew")
        write_recipe(self.recipe, self.inputs, self.directory)
        is_over = state.get("ended") is not None and not lasts_longer(state["ended"], self.recipe)
        self.tracker.message(f"resumed from {path.name}")
        return num_steps if is_over else state["step"], state

    @property
    def _measure(self) -> str:
        return sum_of_measure(self.recipe, self.inputs)

    def begin_step(self, step: int) -> None:
        """From now on a stop waits for the end of ``step``, counted from 1."""
        self.step = step

    def evaluates_after(self, step: int, *, last: bool) -> bool:
        every = self.recipe.evaluation.every if self.recipe.evaluation else None
        return self.evaluator is not None and (last or bool(every and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the weights the workers have."""
        if self.evaluator is None:
            return {}
        with self.clock("evaluate"):
            return self.evaluator.run()

    def report_start(self) -> None:
        """Evaluates and logs what the policy is before the first step."""
        self.tracker.log(StepStats(0, self.evaluate() | self.clock.metrics()))

    def end_step(self, stats: StepStats, state: dict[str, Any], *, last: bool) -> bool:
        """Evaluates and saves when it is due, after the last step and when asked to stop; logs.

        Args:
            state: What the loop needs to go on from here.

        Returns:
            Whether the stage is over: it was the last step, or the evaluation reached ``run.stop_at_score``.
        """
        if self.evaluates_after(stats.step, last=last):
            stats.metrics |= self.evaluate()
            target = self.recipe.run.stop_at_score
            if self.evaluator and target is not None:
                last = last or self.evaluator.score(stats.metrics) >= target
        if not self.startup_told:
            self.tracker.message(self.clock.story(stats.step))
            self.startup_told = True
        stats.metrics |= self.clock.metrics()
        self.tracker.log(stats)
        stopping = self.should_stop() and not last
        ended = length_of(self.recipe) if last else None
        own_state = {"step": stats.step, "kl_coef": self.kl_coef, "has_trained": self.has_trained}
        driver_state = {**own_state, "measure": self._measure, "ended": ended, **state}
        measured = self.evaluator is not None and any(name.startswith("eval/") for name in stats.metrics)
        score = self.evaluator.score(stats.metrics) if self.evaluator and measured else None
        self.unsaved, self.has_moved = EndedStep(stats.step, driver_state, score), False
        # After the log: a resumed run cuts the log back to its checkpoint, so a checkpoint must not run ahead of it.
        if last or stopping or self.schedule.is_due(stats.step):
            self.save(self.unsaved)
        if stopping:
            raise StopRequested(f"stopped after step {stats.step}; go on with --resume")
        return last

    def save(self, ended: EndedStep) -> None:
        """Writes the checkpoint of the step that has just ended, and forgets the oldest."""
        improved = ended.score is not None and ended.score > self.best
        if ended.score is not None:
            self.best = max(self.best, ended.score)
        best = self.best if math.isfinite(self.best) else None
        with self.clock("save"):
            path = checkpoint.publish(
                self.checkpoints, ended.step, {**ended.state, "best": best}, partial(save_trainers, self)
            )
        self.unsaved = None
        self.schedule.saved()
        if improved:
            checkpoint.link(self.checkpoints, "best", path)
        checkpoint.prune(self.checkpoints, self.recipe.run.keep_checkpoints)

    def export(self) -> Path:
        """Writes ``final/``, a Hugging Face directory with a model card and a manifest; an older one is replaced."""

        def write(directory: Path) -> None:
            save_tokenizer(self.tokenizer, directory)
            # A reward model's has a padding token of its own, and takes its place.
            self.actors.trainer.call_all(Trainer.export, directory)
            write_stop_tokens(directory, stop_token_ids(self.tokenizer, self.model))
            write_card(directory, self.directory)

        steps = checkpoint.saved_steps(self.checkpoints)
        facts = {"step": steps[-1] if steps else 0, "length": length_of(self.recipe)}
        return checkpoint.publish_directory(self.directory / "final", facts, write, checkpoint.FINAL_MANIFEST)
