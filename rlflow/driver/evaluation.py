"""Held-out measurements of the current weights: what they generate, or the algorithm's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlflow.driver import learner
from rlflow.driver.rollouts import collect, generate_and_score, listed
from rlflow.driver.units import make_batch, with_reference
from rlflow.recipe import EvaluationBlock
from rlflow.types import Prompt

if TYPE_CHECKING:
    from rlflow.driver.stage import Stage
    from rlflow.driver.units import Unit


class Evaluator(Protocol):
    def prepare(self) -> None:
        """Takes what it needs of actors that will end before the steps begin."""

    def run(self) -> dict[str, float]:
        """Measures. Keys are ``eval/<name>/<metric>``."""
        ...

    def score(self, metrics: Mapping[str, float]) -> float:
        """Of a step that was measured: what the best checkpoint has most of."""
        ...


class LossEvaluator:
    """The algorithm's objective on held-out rows, as one batch, without a gradient."""

    def __init__(self, stage: Stage, block: EvaluationBlock, units: list[Unit]) -> None:
        self.stage, self.units = stage, units
        self.prefix = f"eval/{block.name}"

    def prepare(self) -> None:
        self.units = with_reference(self.stage, self.units)

    def run(self) -> dict[str, float]:
        """The metrics of training, e.g. ``eval/heldout/loss/total``, ``eval/heldout/preference/accuracy``."""
        self.prepare()
        metrics = learner.evaluate(self.stage, *make_batch(self.stage, self.units))
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def score(self, metrics: Mapping[str, float]) -> float:
        """The loss, less being better."""
        losses = {name: value for name, value in metrics.items() if name.startswith(f"{self.prefix}/loss/")}
        return -losses.get(f"{self.prefix}/loss/total", next(iter(losses.values())))


class PassEvaluator:
    """pass@1 and pass@k, by the workers and reward servers of the stage."""

    def __init__(self, stage: Stage, block: EvaluationBlock, prompts: Sequence[Prompt]) -> None:
        self.stage, self.block, self.prompts = stage, block, prompts
        reward = stage.recipe.evaluation_reward
        assert reward is not None
        self.reward = reward.label
        self.rewards_wanted = [reward]
        self.metric = f"eval/{block.name}/pass@1"
        self.params = replace(
            stage.sampling_params(),
            temperature=block.temperature,
            max_new_tokens=block.max_new_tokens or stage.recipe.rollout.max_new_tokens,
        )

    def prepare(self) -> None:
        pass

    def score(self, metrics: Mapping[str, float]) -> float:
        return metrics[self.metric]

    def run(self) -> dict[str, float]:
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
        chunks = generate_and_score(self.stage, items, num_samples, self.params, self.rewards_wanted, "eval/")
        for chunk in collect(self.stage, chunks):
            rewards = chunk.scores.rewards[self.reward].reshape(-1, num_samples)
            passed_P += [int(n) for n in (rewards >= self.block.threshold).sum(axis=1)]
            failed += int(chunk.scores.failed[self.reward].sum())
            errors += chunk.scores.errors
            tokens += len(chunk.rollouts.token_ids)
        if failed:
            of_all = f"{failed} of {len(self.prompts) * num_samples} completions"
            self.stage.tracker.message(f"evaluation {self.block.name}: {of_all} could not be scored:{listed(errors)}")
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
