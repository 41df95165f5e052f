"""What a recipe measures on held-out rows while it trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Discriminator, Field, Tag

from rlflow.recipe.block import Block, Conflict, NonNegativeFloat, NonNegativeInt, Number, PositiveInt
from rlflow.recipe.data_blocks import SourceBlock
from rlflow.recipe.reward_blocks import RewardBlock

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


class EvaluationBlock(Block):
    name: str = "heldout"
    """Metrics are `eval/<name>/...`."""
    data: SourceBlock
    """Held-out rows."""
    every: PositiveInt | None = None
    """Evaluate after every so many steps; before the first and after the last in any case."""
    samples: PositiveInt = 1
    """Completions a prompt, the k of pass@k."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    """The rollout block's when absent; the rest of `sampling` holds here too."""
    top_k: NonNegativeInt | None = None
    """The rollout block's when absent."""
    min_p: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = None
    """The sampling block's when absent."""
    max_new_tokens: PositiveInt | None = None
    """The rollout block's when absent."""
    reward: RewardBlock | None = None
    """What counts as a pass when it reaches `threshold`; the recipe's first reward when absent. Offline without it
    nothing is generated: the algorithm's own loss is measured on the held-out rows (of pairs, accuracy and margin)."""
    threshold: Number = 1.0
    """Least reward that passes."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.samples > 1 and not self.temperature:
            reason = f"{self.samples} greedy completions are all the same: set temperature, or samples: 1"
            yield Conflict(("samples", "temperature"), reason)


OneOrSeveralEvaluations = Annotated[
    Annotated[EvaluationBlock, Tag("<one>")] | Annotated[list[EvaluationBlock], Tag("<several>")],
    Discriminator(lambda given: "<several>" if isinstance(given, list) else "<one>"),
]


def evaluation_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with a recipe's evaluations, or among them."""
    if recipe.evaluation == []:
        yield Conflict(("evaluation",), "is empty: give at least one set, or remove it")
    for name, count in Counter(block.name for block in recipe.evaluations.values()).items():
        if count > 1:
            last = [key for key, block in recipe.evaluations.items() if block.name == name][-1]
            reason = f"{count} are called {name}: metrics could not tell them apart; give each a `name` of its own"
            yield Conflict((f"{last}.name", last), reason)
    if recipe.run.stop_at_score is not None and recipe.evaluation_reward is None:
        reason = "is a share of answers that pass, and nothing decides what passes: give evaluation.reward"
        yield Conflict(("run.stop_at_score", "evaluation.reward"), reason)
    if recipe.algorithm.learning.head != "token":
        for key, block in recipe.evaluations.items():
            if recipe.reward_of(block) is not None:
                yield Conflict((f"{key}.reward", "algorithm.name"), "a reward model writes no answers: remove it")
