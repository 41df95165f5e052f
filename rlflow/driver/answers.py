"""The data's own answers as rollouts: what an online step trains of rows that the policy does not answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlflow.data.errors import Rows
from rlflow.data.examples import Example, load_examples
from rlflow.driver.sampling import sample_seed
from rlflow.recipe import Recipe
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.types import Group, Prompt, Rollout


class Answers:
    def __init__(self, examples: Sequence[Example], tokenizer: Any, *, on_policy: float, seed: int) -> None:
        """
        Args:
            on_policy: Share of the rows that the policy answers itself.
            seed: Of the draw.
        """
        self._examples = {example.id: example for example in examples}
        self._tokenizer, self._on_policy, self._seed = tokenizer, on_policy, seed

    def has(self, prompt: Prompt) -> bool:
        """Whether the data has an answer to the prompt."""
        return prompt.id in self._examples

    def group(self, prompt: Prompt, epoch: int, step: int) -> Group | None:
        """The data's answer as a group of one rollout; None where the policy is to answer.

        Each row of each epoch is drawn for itself, by the run's seed: in whatever order, and after a resume, the same.
        """
        drawn = sample_seed(self._seed, f"{prompt.id} on policy", epoch, 0) / 2.0**63
        if drawn < self._on_policy:
            return None
        example = self._examples[prompt.id]
        rollout = Rollout(
            token_ids=example.token_ids,
            is_sampled=example.loss_mask,
            logprobs=np.zeros(len(example.token_ids), dtype=np.float32),
            # It is never stale.
            versions=np.where(example.loss_mask, step, -1).astype(np.int32),
            finish_reason="stop",
            text=self._tokenizer.decode(example.token_ids[example.loss_mask], skip_special_tokens=True),
            rewards={},
            reward=0.0,
        )
        return Group(prompt, epoch, (rollout,))


def load_answers(recipe: Recipe, tokenizer: Any) -> Answers | None:
    """Those of ``data.train``; None where the recipe trains none beside the policy's own.

    Raises:
        DataError: Rows have none.
    """
    if not recipe.trains_answers:
        return None
    distill = recipe.online.distill
    assert isinstance(distill, DivergenceDistillBlock)
    examples = load_examples(recipe.data, tokenizer, recipe.run.seed)
    return Answers(examples, tokenizer, on_policy=distill.on_policy, seed=recipe.run.seed)


def with_answers(prompts: Rows[Prompt], answers: Answers | None) -> Rows[Prompt]:
    """The prompts that have an answer, where answers are trained: of the others it was too long."""
    if answers is None:
        return prompts
    return Rows([prompt for prompt in prompts if answers.has(prompt)], prompts.skipped, prompts.notes)
