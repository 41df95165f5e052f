"""pass@1 and pass@k of the current weights, by the workers and reward servers that training has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import comb

import numpy as np

from rlflow.driver.errors import RunError
from rlflow.driver.evaluation import Evaluation
from rlflow.driver.pool import RolloutPool
from rlflow.driver.rollout_report import listed
from rlflow.driver.sampling import sample_seed
from rlflow.recipe import EvaluationBlock, RewardBlock
from rlflow.rewards.score_batch import ScoreBatch
from rlflow.tracking.tracker import Tracker
from rlflow.types import Group, GroupRequest, Limits, Prompt, SamplingParams


class PassEvaluator:
    def __init__(
        self,
        pool: RolloutPool,
        block: EvaluationBlock,
        reward: RewardBlock,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        tracker: Tracker,
        limits: Limits | None = None,
        *,
        is_pinned: bool = True,
    ) -> None:
        """
        Args:
            limits: Of episodes, where there is an environment.
            params: Of training; the block changes them.
            seed: The run's.
            is_pinned: Its completions have the same bits every time; else they are asked of whoever has room.
        """
        self.pool, self.seed, self.block, self.prompts, self.tracker = pool, seed, block, prompts, tracker
        self.reward, self.limits, self.is_pinned = reward.label, limits, is_pinned
        self._arrived: dict[int, tuple[Group, ScoreBatch]] | None = None
        """By id of the request, which are in the order of the prompts, while it is under way."""
        self._version = -1
        self.metric = f"eval/{block.name}/pass@1"
        self.params = replace(
            params,
            temperature=block.temperature,
            max_new_tokens=block.max_new_tokens or params.max_new_tokens,
            top_p=params.top_p if block.top_p is None else block.top_p,
            top_k=params.top_k if block.top_k is None else block.top_k,
            min_p=params.min_p if block.min_p is None else block.min_p,
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
        num_samples, num_prompts = self.block.samples, len(self.prompts)
        groups = self._generate()
        passed_P = [int((scores.rewards[self.reward] >= self.block.threshold).sum()) for _, scores in groups]
        failed = sum(int(scores.failed[self.reward].sum()) for _, scores in groups)
        tokens = sum(int(rollout.is_sampled.sum()) for group, _ in groups for rollout in group.rollouts)
        if failed:
            errors = listed([error for _, scores in groups for error in scores.errors])
            of_all = f"{failed} of {num_prompts * num_samples} completions"
            self.tracker.message(f"evaluation {self.block.name}: {of_all} could not be scored:{errors}")
        prefix = f"eval/{self.block.name}"
        metrics = {
            f"{prefix}/pass@1": float(np.mean([pass_at_k(num_samples, n, 1) for n in passed_P])),
            f"{prefix}/mean_tokens": tokens / (num_prompts * num_samples),
            f"{prefix}/unscored_fraction": failed / (num_prompts * num_samples),
        }
        if num_samples > 1:
            passes = [pass_at_k(num_samples, n, num_samples) for n in passed_P]
            metrics[f"{prefix}/pass@{num_samples}"] = float(np.mean(passes))
        return metrics

    def _generate(self) -> list[tuple[Group, ScoreBatch]]:
        """The groups of all prompts, in their order, and their scores."""
        if self._arrived is None:
            self.begin()
        arrived, self._arrived = self._arrived, None
        assert arrived is not None
        size = len(self.prompts)
        self.pool.wait_until(
            lambda: len(arrived) == size, lambda: self.tracker.progress("evaluating", len(arrived), size)
        )
        oldest = min(group.oldest_version for group, _ in arrived.values())
        if oldest < self._version:
            raise RunError(
                f"evaluation {self.block.name}: policy version {oldest} was measured, and version {self._version} was "
                "asked for: newer weights do not reach a worker's engine"
            )
        return [arrived[number] for number in sorted(arrived)]

    def begin(self) -> None:
        self._arrived = arrived = {}
        self._version = self.pool.version
        samples = range(self.block.samples)

        def deliver(request: GroupRequest, group: Group, scores: ScoreBatch) -> None:
            arrived[request.id] = group, scores

        requests = [
            GroupRequest(
                self.pool.next_id(),
                prompt,
                tuple(sample_seed(self.seed, f"eval/{prompt.id}", 0, k) for k in samples),
                self.params,
                limits=self.limits,
                min_version=self._version,
                labels=(self.reward,),
                priority=(0, index),
                is_pinned=self.is_pinned,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        self.pool.ask(requests, deliver)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples passes: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)
