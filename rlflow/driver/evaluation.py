"""Held-out measurements of the current weights: what they generate, or the algorithm's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Protocol

import numpy as np

from rlflow.algorithms.batch_targets import Unit, with_targets
from rlflow.driver.learner import Learner
from rlflow.driver.rollouts import Generation, collect, generate_and_score, listed
from rlflow.driver.units import score_units
from rlflow.metrics import values_of
from rlflow.recipe import EvaluationBlock, RewardBlock
from rlflow.types import Prompt


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a held-out measurement found."""

    metrics: dict[str, float]
    """Keys are ``eval/<name>/<metric>``."""
    score: float
    """What the best checkpoint has most of."""


class Evaluator(Protocol):
    def prepare(self) -> None:
        """Takes what it needs of actors that will end before the steps begin."""

    def run(self) -> Evaluation:
        """Measures."""
        ...


class LossEvaluator:
    """The algorithm's objective on held-out rows, as one batch, without a gradient."""

    def __init__(self, learner: Learner, block: EvaluationBlock, units: Sequence[Unit]) -> None:
        self.learner, self.units = learner, list(units)
        self.prefix = f"eval/{block.name}"

    def prepare(self) -> None:
        self.units = score_units(self.learner, self.units)

    def run(self) -> Evaluation:
        """The metrics of training, e.g. ``eval/heldout/loss/total``, and the loss, less being better."""
        self.prepare()
        learner = self.learner
        found = learner.evaluate(with_targets(self.units, learner.algorithm, learner.logprobs))
        metrics = {f"{self.prefix}/{name}": value for name, value in values_of(found.metrics).items()}
        return Evaluation(metrics, -found.loss)


class PassEvaluator:
    """pass@1 and pass@k, by the workers and reward servers of the run."""

    def __init__(
        self, generation: Generation, block: EvaluationBlock, reward: RewardBlock, prompts: Sequence[Prompt]
    ) -> None:
        self.generation, self.block, self.prompts = generation, block, prompts
        self.reward = reward.label
        self.rewards_wanted = [reward]
        self.metric = f"eval/{block.name}/pass@1"
        self.params = replace(
            generation.params,
            temperature=block.temperature,
            max_new_tokens=block.max_new_tokens or generation.params.max_new_tokens,
        )

    def prepare(self) -> None:
        pass

    def run(self) -> Evaluation:
        metrics = self.measure()
        return Evaluation(metrics, metrics[self.metric])

    def measure(self) -> dict[str, float]:
        """Generates ``samples`` completions a prompt, the same seeds every time, and scores them.

        Returns:
            ``pass@1`` (mean over prompts of the share of passing samples), ``pass@k`` for k = samples, mean length, and
            the share of completions that failed to be scored, which count as not passed.
        """
        items = [(0, prompt) for prompt in self.prompts]
        num_samples = self.block.samples
        passed_P: list[int] = []
        tokens = failed = 0
        errors: list[str] = []
        chunks = generate_and_score(self.generation, items, num_samples, self.params, self.rewards_wanted, "eval/")
        for chunk in collect(self.generation, chunks):
            rewards = chunk.scores.rewards[self.reward].reshape(-1, num_samples)
            passed_P += [int(n) for n in (rewards >= self.block.threshold).sum(axis=1)]
            failed += int(chunk.scores.failed[self.reward].sum())
            errors += chunk.scores.errors
            tokens += len(chunk.rollouts.token_ids)
        if failed:
            of_all = f"{failed} of {len(self.prompts) * num_samples} completions"
            self.generation.tracker.message(
                f"evaluation {self.block.name}: {of_all} could not be scored:{listed(errors)}"
            )
        prefix = f"eval/{self.block.name}"
        metrics = {
            f"{prefix}/pass@1": float(np.mean([pass_at_k(num_samples, n, 1) for n in passed_P])),
            f"{prefix}/mean_tokens": tokens / (len(self.prompts) * num_samples),
            f"{prefix}/unscored_fraction": failed / (len(self.prompts) * num_samples),
        }
        if num_samples > 1:
            passes = [pass_at_k(num_samples, n, num_samples) for n in passed_P]
            metrics[f"{prefix}/pass@{num_samples}"] = float(np.mean(passes))
        return metrics


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples passes: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)
