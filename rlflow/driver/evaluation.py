"""Held-out measurements: pass@1 and pass@k of the current weights, by the same workers and reward servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from rlflow.driver.rollouts import collect, generate_and_score
from rlflow.recipe import EvaluationBlock
from rlflow.types import Prompt

if TYPE_CHECKING:
    from rlflow.driver.stage import Stage


class Evaluator:
    def __init__(self, stage: Stage, block: EvaluationBlock, prompts: Sequence[Prompt]) -> None:
        self.stage, self.block, self.prompts = stage, block, prompts
        reward = stage.recipe.evaluation_reward
        assert reward is not None
        self.reward = reward.label
        self.metric = f"eval/{block.name}/pass@1"
        self.params = replace(
            stage.sampling_params(),
            temperature=block.temperature,
            max_new_tokens=block.max_new_tokens or stage.recipe.rollout.max_new_tokens,
        )

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
        for chunk in collect(self.stage, generate_and_score(self.stage, items, num_samples, self.params, "eval/")):
            rewards = chunk.scores.rewards[self.reward].reshape(-1, num_samples)
            passed_P += [int(n) for n in (rewards >= self.block.threshold).sum(axis=1)]
            failed += int(chunk.scores.failed[self.reward].sum())
            tokens += len(chunk.rollouts.token_ids)
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
