"""The recipe's blocks. Every field has its meaning under it; an unknown key is an error (see loading.py).

No torch, ray or vllm import here: a recipe validates anywhere, at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlflow.recipe.adapter_rules import adapter_conflicts
from rlflow.recipe.algorithm import Algorithm, OnlineBlock
from rlflow.recipe.algorithm_blocks import CriticBlock
from rlflow.recipe.algorithm_kinds import SampleBlock
from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    exactly_one,
)
from rlflow.recipe.data_blocks import DataBlock
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.recipe.environment_blocks import EnvironmentBlock, environment_conflicts
from rlflow.recipe.evaluation_blocks import EvaluationBlock, OneOrSeveralEvaluations, evaluation_conflicts
from rlflow.recipe.expand_block import expand_conflicts
from rlflow.recipe.function_blocks import CallbackBlock, MetricBlock
from rlflow.recipe.mixture_blocks import DemonstrationsBlock
from rlflow.recipe.model_blocks import ModelBlock
from rlflow.recipe.reference_block import ReferenceBlock
from rlflow.recipe.reward_blocks import RewardBlock, RewardServerBlock
from rlflow.recipe.rollout_blocks import AtUpdateBlock, RecoveryBlock, SamplingBlock
from rlflow.recipe.rollout_server import RolloutServerBlock, rollout_server_conflicts
from rlflow.recipe.rows.row import Family
from rlflow.recipe.sample_blocks import sampling_conflicts
from rlflow.recipe.sequence_rules import sequence_conflicts
from rlflow.recipe.teacher_block import TeacherBlock, teacher_conflicts
from rlflow.recipe.tracking_blocks import ExperimentBlock, TrackerName
from rlflow.recipe.trainer_blocks import TrainerBlock, trainer_conflicts


class RolloutBlock(Block):
    engine: Literal["auto", "torch", "vllm", "http"] = "auto"
    """auto: vllm where there is a GPU, torch elsewhere. http: servers of yours, see rollout_server."""
    workers: PositiveInt = 1
    """RolloutWorker actors."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    """Of sampling; the trainer's logprobs use the same."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    top_k: NonNegativeInt = 0
    """0 keeps every token."""
    max_num_seqs: PositiveInt = 256
    """Completions an engine generates at a time."""
    cpus_per_worker: PositiveFloat | None = None
    """Ray CPUs, and compute threads, of each worker. Left out: 1 Ray CPU, and as many threads as there are cores that
    nobody else computes on meanwhile, where the run starts Ray itself and the worker has no GPU."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each worker."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs one engine is split over (vllm)."""
    gpu_memory_fraction: Fraction = 0.5
    """Share of a GPU's memory the engine may take (vllm)."""
    kv_cache_gib: PositiveFloat = 2.0
    """Key-value cache on a machine without GPU (vllm)."""
    timeout_s: PositiveFloat = 1800.0
    """A worker whose engine makes no step for so long is started again."""
    at_update: AtUpdateBlock = AtUpdateBlock()
    """What new weights do to completions under way; only with run.max_staleness are there any."""
    recovery: RecoveryBlock = RecoveryBlock()
    """What becomes of workers that die, hang or are slow."""

    def conflicts(self) -> Iterator[Conflict]:
        size = self.tensor_parallel_size
        if size > 1 and self.engine == "torch":
            yield Conflict(("tensor_parallel_size", "engine"), "the torch engine is not split: set engine: vllm")
        elif size > 1 and self.gpus_per_worker < size:
            reason = f"{size} needs as many GPUs: set gpus_per_worker: {size}"
            yield Conflict(("tensor_parallel_size", "gpus_per_worker"), reason)
        if size > 1 and self.at_update.transport in ("ipc", "collective"):
            reason = "an engine of several GPUs takes new weights from its worker's process: leave it out"
            yield Conflict(("at_update.transport", "tensor_parallel_size"), reason)


class RunBlock(Block):
    steps: PositiveInt | None = None
    """Optimizer steps; or give epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the data; or give steps."""
    stop_at_score: Fraction | None = None
    """End the stage early, as soon as pass@1 of the (first) evaluation reaches this."""
    max_staleness: NonNegativeInt = 0
    """Versions a rollout may lag behind the policy it trains; 0 is synchronous."""
    max_skipped_steps: PositiveInt = 3
    """This many steps in a row whose gradient was not finite, or in which nothing was scored, stop the run."""
    max_restarts: NonNegativeInt = 3
    """A stage whose trainer, critic or reference dies goes on from its newest checkpoint with fresh actors, so many
    times; then the run ends."""
    seed: NonNegativeInt = 0
    """Of everything random."""
    output_dir: str = "runs/run"
    """Where results go."""
    save_every: PositiveInt | None = None
    """Checkpoint after every so many steps; after the last in any case."""
    save_every_minutes: PositiveFloat | None = 15.0
    """Checkpoint at the end of a step when the last one is so old; null: by steps alone."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many stay, and the best."""
    log_rollouts_every: PositiveInt = 1
    """Steps between Parquet files of rollouts."""
    startup_timeout_s: PositiveFloat = 600.0
    """Actors that are not ready by then are an error."""


class Recipe(Block):
    """One stage, resolved: every key has its value."""

    stage: str | None = None
    """Name of the stage, when the file has several."""
    algorithm: Algorithm
    """What is optimised."""
    model: ModelBlock
    """The policy's starting point."""
    data: DataBlock
    """What it learns from."""
    demonstrations: DemonstrationsBlock | None = None
    """What an online algorithm learns from beside its rollouts, where algorithm.mixture says how much it counts."""
    rewards: list[RewardBlock] = Field(default_factory=list)
    """What is good."""
    reward_server: RewardServerBlock = RewardServerBlock()
    """Who computes rewards."""
    rollout: RolloutBlock = RolloutBlock()
    """Who generates."""
    sampling: SamplingBlock = SamplingBlock()
    """How completions are drawn, beside rollout.temperature, top_p and top_k."""
    environment: EnvironmentBlock | None = None
    """Who answers the policy; without it a completion is a rollout."""
    rollout_server: RolloutServerBlock = RolloutServerBlock()
    """The servers of engine http."""
    trainer: TrainerBlock = TrainerBlock()
    """Who trains."""
    reference: ReferenceBlock = ReferenceBlock()
    """The frozen model of the KL term."""
    teacher: TeacherBlock = TeacherBlock()
    """The model that algorithm.distill learns from."""
    evaluation: OneOrSeveralEvaluations | None = None
    """Held-out measurements during the run: one set, or a list of several. The first decides which checkpoint is best,
    and run.stop_at_score."""
    run: RunBlock = RunBlock()
    """How long, where to."""
    tracking: list[TrackerName] = Field(default_factory=lambda: ["console", "jsonl"])
    """Who is told."""
    experiment: ExperimentBlock = ExperimentBlock()
    """What wandb, trackio and SwanLab call the run."""
    metrics: list[MetricBlock] = Field(default_factory=list)
    """Metrics of your own, of each step's rollouts: `"file.py:function"`, or a block with arguments; docs/extend.md."""
    callbacks: list[CallbackBlock] = Field(default_factory=list)
    """What is called behind each step, evaluation and checkpoint: `"file.py:name"`, or a block with arguments;
    docs/extend.md."""

    @property
    def family(self) -> Family:
        """Which driver runs it."""
        return self.algorithm.learning.family

    @property
    def needs_rollouts(self) -> bool:
        """Whether anybody generates: to train on it, or to evaluate."""
        return self.generates or any(self.reward_of(block) for block in self.evaluations.values())

    @property
    def generates(self) -> bool:
        """Whether its rows are prompts, which a model answers."""
        return self.algorithm.learning.generates

    @property
    def trains(self) -> bool:
        """Whether a model is trained: a stage that samples leaves rows instead."""
        return self.algorithm.learning.objective != "none"

    @property
    def rollouts_per_prompt(self) -> int:
        """Completions a prompt that are generated and scored, where its rows are prompts."""
        assert isinstance(self.algorithm, OnlineBlock | SampleBlock), f"{self.algorithm.name} learns from given rows"
        return self.algorithm.rollouts_per_prompt

    @property
    def waits_for_rows(self) -> bool:
        """Whether an earlier stage makes some of its rows."""
        demonstrations = [] if self.demonstrations is None else [self.demonstrations.train]
        given = [self.data.train, *demonstrations]
        return any(source.stage for one in given for source in (one if isinstance(one, list) else [one]))

    @property
    def cut_by(self) -> str | None:
        """The key that makes what is sampled another distribution than the trainer's, if one does."""
        rollout, sampling = self.rollout, self.sampling
        is_cut = {
            "rollout.top_p": rollout.top_p < 1,
            "rollout.top_k": rollout.top_k > 0,
            "sampling.min_p": sampling.min_p > 0,
            "sampling.repetition_penalty": sampling.repetition_penalty != 1,
        }
        return next((key for key, cuts in is_cut.items() if cuts), None)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model scores what is trained."""
        return self.algorithm.needs_reference

    @property
    def places_reference(self) -> bool:
        """Whether it has actors of its own: a trainer of adapters holds their base, and another adapter of it."""
        return self.needs_reference and not self.reference.is_beside(self.model)

    def held_reference(self, model: ModelBlock) -> str | None:
        """The adapter that a trainer of adapters holds as its reference; None where that is the base, or elsewhere.

        Args:
            model: The recipe's, with paths that exist.
        """
        is_beside = self.needs_reference and not self.places_reference
        return self.reference.held_adapter(model) if is_beside else None

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores what is trained."""
        return self.algorithm.needs_teacher

    @property
    def trains_answers(self) -> bool:
        """Whether some of what is trained online are the data's answers, in the place of the policy's own."""
        distill = self.algorithm.distill if isinstance(self.algorithm, OnlineBlock) else None
        return isinstance(distill, DivergenceDistillBlock) and 0 < distill.on_policy < 1

    @property
    def places_teacher(self) -> bool:
        """Whether it has actors of its own: a trainer of a new adapter holds its base anyway, which scores tokens."""
        adapter = self.model.adapter
        starts_as_base = adapter is not None and adapter.path is None and self.reference.adapter is None
        is_base = starts_as_base and self.teacher.path == self.model.path
        scores_tokens = self.needs_teacher and self.online.distill.kind == "advantage"
        return self.needs_teacher and not (is_base and scores_tokens)

    @property
    def online(self) -> OnlineBlock:
        """The algorithm of a recipe that learns from rollouts."""
        assert isinstance(self.algorithm, OnlineBlock), f"{self.algorithm.name} learns from given rows"
        return self.algorithm

    @property
    def critic(self) -> CriticBlock | None:
        """The value model that learns beside the policy."""
        return self.algorithm.critic if isinstance(self.algorithm, OnlineBlock) else None

    @property
    def max_completion_tokens(self) -> int:
        """Behind the prompt of a rollout that is trained, at most: what the policy writes and an environment says."""
        return self.episode_tokens(self.rollout.max_new_tokens)

    def episode_tokens(self, max_new_tokens: int) -> int:
        """The same, of rollouts whose turns have at most so many tokens."""
        if self.environment is None:
            return max_new_tokens
        return self.environment.max_tokens or self.environment.max_turns * max_new_tokens

    @property
    def evaluations(self) -> dict[str, EvaluationBlock]:
        """All sets that are measured, by dotted key: ``evaluation``, or ``evaluation.0`` and so on."""
        given = self.evaluation
        if isinstance(given, list):
            return {f"evaluation.{index}": block for index, block in enumerate(given)}
        return {} if given is None else {"evaluation": given}

    def reward_of(self, evaluation: EvaluationBlock) -> RewardBlock | None:
        """What decides whether an answer passes; None when the evaluation generates nothing."""
        return evaluation.reward or (self.rewards[0] if self.rewards else None)

    @property
    def evaluation_reward(self) -> RewardBlock | None:
        """Of the first evaluation; None where there is none, too."""
        return next(map(self.reward_of, self.evaluations.values()), None)

    @property
    def scoring(self) -> list[RewardBlock]:
        """Every function a reward server needs: the rewards, then those of evaluations that are not among them."""
        found = list(self.rewards)
        for block in self.evaluations.values():
            reward = self.reward_of(block)
            found += [] if reward is None or reward in found else [reward]
        return found

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._model_conflicts()
        yield from adapter_conflicts(self)
        yield from expand_conflicts(self)
        yield from rollout_server_conflicts(self)
        yield from environment_conflicts(self)
        yield from evaluation_conflicts(self)
        yield from teacher_conflicts(self)
        yield from sequence_conflicts(self)
        yield from trainer_conflicts(self.trainer, self.model, self.critic)
        yield from self._reward_conflicts()
        yield from self._metric_conflicts()
        yield from self._label_conflicts()
        run = self.run
        if (run.steps is None) == (run.epochs is None):
            yield Conflict(("run.steps", "run.epochs"), exactly_one(steps=run.steps, epochs=run.epochs))
        if isinstance(self.algorithm, SampleBlock):
            yield from sampling_conflicts(self, self.algorithm.keep)
        if isinstance(self.algorithm, OnlineBlock):
            yield from self._online_conflicts(self.algorithm)
        elif self.demonstrations is not None:
            reason = f"stand beside rollouts, and {self.algorithm.name} has none: name them in data.train"
            yield Conflict(("demonstrations", "algorithm.name"), reason)

    def _label_conflicts(self) -> Iterator[Conflict]:
        train = self.data.train
        several = {f".{n}": source for n, source in enumerate(train)} if isinstance(train, list) else {"": train}
        for index, source in several.items():
            if source.label is not None and self.algorithm.learning.data_row not in ("labelled", "judged"):
                reason = f"says which answers are desirable, and {self.algorithm.name} does not ask: remove it"
                yield Conflict((f"data.train{index}.label", "algorithm.name"), reason)

    def _online_conflicts(self, algorithm: OnlineBlock) -> Iterator[Conflict]:
        kl, prompts = algorithm.kl, self.data.prompts_per_step
        updates, samples = algorithm.groups.updates_per_step, prompts * algorithm.group_size
        if prompts % updates:
            reason = f"{updates} does not divide data.prompts_per_step ({prompts})"
            yield Conflict(("algorithm.groups.updates_per_step", "data.prompts_per_step"), reason)
        yield from self._mixture_conflicts(algorithm)
        if kl.target is not None and kl.horizon < samples:
            reason = f"{kl.horizon} is less than the {samples} samples of a step: the coefficient would jump; raise it"
            yield Conflict(("algorithm.kl.horizon", "data.prompts_per_step"), reason)
        if self.cut_by is not None:
            for keys, reason in algorithm.correction.cut_conflicts(self.cut_by):
                yield Conflict((f"algorithm.correction.{keys[0]}", *keys[1:]), reason)

    def _mixture_conflicts(self, algorithm: OnlineBlock) -> Iterator[Conflict]:
        keys, demonstrations = ("demonstrations", "algorithm.mixture"), self.demonstrations
        if demonstrations is None:
            if algorithm.mixture is not None:
                reason = "algorithm.mixture weighs demonstrations: give demonstrations.train, rows with answers"
                yield Conflict(keys, reason)
        elif algorithm.mixture is None:
            reason = f"are trained where algorithm.mixture says how much they count, and {algorithm.name} has none: "
            yield Conflict(keys, f"{reason}take algorithm.name: chord, give algorithm.mixture, or remove them")
        elif demonstrations.per_step < algorithm.num_mini_batches:
            reason = f"{demonstrations.per_step} are too few for {algorithm.num_mini_batches} updates: each needs one"
            yield Conflict(("demonstrations.per_step", "algorithm.groups.updates_per_step"), reason)

    def _model_conflicts(self) -> Iterator[Conflict]:
        model = self.model
        if (model.path is None) == (model.architecture is None):
            reason = exactly_one(path=model.path, architecture=model.architecture)
            yield Conflict(("model.path", "model.architecture"), reason)
        if model.architecture is not None and not isinstance(model.architecture.get("model_type"), str):
            yield Conflict(("model.architecture",), "needs model_type, e.g. llama or qwen3")
        if model.architecture is not None and not model.characters:
            reason = "a new model needs a tokenizer: give the characters it is to know"
            yield Conflict(("model.characters", "model.architecture"), reason)
        if model.architecture is None and model.characters is not None:
            reason = "are the tokenizer of a new model: give architecture, or remove them"
            yield Conflict(("model.characters", "model.architecture"), reason)
        if model.architecture is not None and model.revision is not None:
            yield Conflict(("model.revision", "model.architecture"), "is a hub id's, and this model is new: remove it")

    def _reward_conflicts(self) -> Iterator[Conflict]:
        name = self.algorithm.name
        if self.family == "online" and not self.rewards and not self.needs_teacher:
            yield Conflict(("rewards", "algorithm.name"), f"{name} learns from rewards: give at least one")
        if not self.generates and self.rewards:
            reason = f"{name} does not use rewards: remove them, or move them to the stage that does"
            yield Conflict(("rewards", "algorithm.name"), reason)
        is_policy = self.algorithm.learning.head == "token"
        if not is_policy and self.model.liger:
            yield Conflict(("model.liger", "algorithm.name"), "has kernels for policies alone: remove it")
        for label, count in Counter(reward.label for reward in self.scoring).items():
            if count > 1:
                reason = f"{count} are called {label}: metrics could not tell them apart; give one a `label` of its own"
                yield Conflict(("rewards",), reason)

    def _metric_conflicts(self) -> Iterator[Conflict]:
        if self.metrics and not self.generates:
            reason = f"are of rollouts, and {self.algorithm.name} has none: remove them, or give a callback"
            yield Conflict(("metrics", "algorithm.name"), reason)
        for name, count in Counter(metric.name for metric in self.metrics).items():
            if count > 1:
                reason = f"{count} are called {name}: give one a `label` of its own"
                yield Conflict(("metrics",), reason)
