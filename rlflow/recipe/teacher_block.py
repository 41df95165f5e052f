"""The model that a policy is distilled from, and what it rules out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from rlflow.recipe.advantage_blocks import BaselineBlock
from rlflow.recipe.algorithm import OnlineBlock
from rlflow.recipe.block import (
    Block,
    Conflict,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    exactly_one,
)
from rlflow.recipe.distill_blocks import AdvantageDistillBlock, DivergenceDistillBlock

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


class TeacherBlock(Block):
    path: str | None = None
    """A Hugging Face directory or hub id, of the policy's tokenizer. Named as model.path, a trainer of a new adapter is
    its own teacher, with the adapter off."""
    url: str | None = None
    """An OpenAI-compatible server that gives prompt logprobs, as vLLM's and `rlflow serve` do, e.g. http://10.0.0.5:8000."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of what computes; the policy's when absent."""
    workers: PositiveInt = 1
    """Teacher actors, each with a whole copy; with url, each with its own calls to the server."""
    cpus_per_worker: NonNegativeFloat | None = None
    """Ray CPUs, and compute threads, of each. Left out: as of the trainer."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for an answer of the server."""
    requests_at_once: PositiveInt = 16
    """Sequences that the server is asked about at a time, by each worker."""
    served_model: str | None = None
    """Name of the teacher among the server's models; its first when absent."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.path is not None and self.url is not None:
            yield Conflict(("path", "url"), exactly_one(path=self.path, url=self.url))
        if self.url is not None:
            if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
                yield Conflict(("url",), f"{self.url} is no address: write e.g. http://10.0.0.5:8000")
            if self.gpus_per_worker or self.dtype is not None:
                key = "gpus_per_worker" if self.gpus_per_worker else "dtype"
                yield Conflict((key, "url"), "is the server's own: remove it")
        elif self.served_model is not None:
            yield Conflict(("served_model", "url"), "is of a server: give url, or remove it")


def teacher_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with a teacher, or without."""
    teacher, algorithm = recipe.teacher, recipe.algorithm
    if not recipe.needs_teacher:
        if teacher != TeacherBlock():
            reason = f"{algorithm.name} asks no teacher: set algorithm.distill.kind to advantage or divergence, or "
            yield Conflict(("teacher", "algorithm.distill.kind"), f"{reason}remove it")
        return
    assert isinstance(algorithm, OnlineBlock)
    distill = algorithm.distill
    if teacher.path is None and teacher.url is None:
        yield Conflict(("teacher.path", "algorithm.distill.kind"), "the policy learns from a teacher: give path or url")
    if teacher.url is not None:
        yield from _of_server(recipe)
    if isinstance(distill, DivergenceDistillBlock):
        yield from _of_divergence(recipe, algorithm, distill)
    if not recipe.rewards:
        yield from _without_rewards(algorithm)
        if teacher.path is not None and teacher.path == recipe.model.path and distill.kind == "advantage":
            reason = "is what the policy starts from, which has nothing to learn from it: name another, or give rewards"
            yield Conflict(("teacher.path", "model.path"), reason)


def _of_server(recipe: Recipe) -> Iterator[Conflict]:
    """A server says what its model gives each token of a text, and the most probable ones, at temperature 1."""
    distill = recipe.online.distill
    if isinstance(distill, AdvantageDistillBlock) and recipe.rollout.temperature != 1:
        reason = "a server's prompt logprobs are of temperature 1: set it to 1, or give teacher.path"
        yield Conflict(("rollout.temperature", "teacher.url"), reason)
    if isinstance(distill, DivergenceDistillBlock):
        if distill.top_k is None:
            reason = "a server gives its most probable tokens alone: set it, e.g. to 20, or give teacher.path"
            yield Conflict(("algorithm.distill.top_k", "teacher.url"), reason)
        if distill.temperature != 1:
            reason = "a server's logprobs are of temperature 1: set it to 1, or give teacher.path"
            yield Conflict(("algorithm.distill.temperature", "teacher.url"), reason)


def _of_divergence(recipe: Recipe, algorithm: OnlineBlock, distill: DivergenceDistillBlock) -> Iterator[Conflict]:
    if distill.on_policy == 1:
        return
    if recipe.rewards:
        reason = "rewards are of the policy's own answers: set it to 1, or remove the rewards"
        yield Conflict(("algorithm.distill.on_policy", "rewards"), reason)
    if recipe.environment is not None:
        reason = "the data's answers have no environment: set it to 1, or remove the environment"
        yield Conflict(("algorithm.distill.on_policy", "environment"), reason)
    if algorithm.correction.mode != "none":
        reason = "no engine has sampled the data's answers: set it to none"
        yield Conflict(("algorithm.correction.mode", "algorithm.distill.on_policy"), reason)


def _without_rewards(algorithm: OnlineBlock) -> Iterator[Conflict]:
    """What says something of rewards that there are not."""
    groups, advantage = algorithm.groups, algorithm.advantage
    idle = {
        "algorithm.groups.require_signal": groups.require_signal,
        "algorithm.groups.overlong_buffer": groups.overlong_buffer > 0,
        "algorithm.groups.reward_scaling": groups.reward_scaling != "sum",
        "algorithm.advantage.estimator": not isinstance(advantage, BaselineBlock),
        "algorithm.advantage.whiten": advantage.whiten,
    }
    for key, is_set in idle.items():
        if is_set:
            yield Conflict((key, "rewards"), "is of rewards, and there are none: give rewards, or remove it")
