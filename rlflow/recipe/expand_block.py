"""Block expansion (LLaMA Pro, arXiv 2401.02415): new layers between those of a model, which alone are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlflow.recipe.block import Block, Conflict, PositiveInt

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of an expanded model comes from."""

    source: int
    """The layer of the model before, counted from 0."""
    is_new: bool
    """It is a copy of that layer, with outputs of 0."""


class ExpandBlock(Block):
    new_layers: PositiveInt
    """How many layers the model gets: copies whose output projections are 0, so that they change nothing yet."""
    groups: PositiveInt | None = None
    """The model's layers are cut into so many groups of one size, and each gets as many copies of its last layer behind
    it; one copy each when absent."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.new_layers % self.num_groups:
            reason = f"does not divide the {self.new_layers} new layers: each group gets as many"
            yield Conflict(("groups", "new_layers"), reason)

    @property
    def num_groups(self) -> int:
        return self.groups or self.new_layers

    def problem(self, num_layers: int) -> str | None:
        """Why a model of so many layers cannot be expanded this way, and what to do; None where it can."""
        if num_layers % self.num_groups == 0:
            return None
        divisors = [count for count in range(1, num_layers + 1) if num_layers % count == 0]
        nearest = ", ".join(map(str, sorted(sorted(divisors, key=lambda count: abs(count - self.num_groups))[:3])))
        return (
            f"the model's {num_layers} layers are not cut into {self.num_groups} groups of one size: name another "
            f"number, such as {nearest}"
        )

    def layers(self, num_layers: int) -> list[LayerOrigin]:
        """The layers of the expanded model, in order.

        Args:
            num_layers: Of the model before; ``problem`` has nothing to say of it.
        """
        size, copies = num_layers // self.num_groups, self.new_layers // self.num_groups
        expanded = []
        for source in range(num_layers):
            expanded.append(LayerOrigin(source, is_new=False))
            if (source + 1) % size == 0:
                expanded += [LayerOrigin(source, is_new=True)] * copies
        return expanded


def expand_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with ``model.expand``."""
    model = recipe.model
    if model.expand is None:
        return
    if model.architecture is not None:
        yield Conflict(("model.expand", "model.architecture"), "is of a model that is trained already: remove it")
    if model.adapter is not None:
        yield Conflict(("model.expand", "model.adapter"), "trains new layers, and an adapter none: remove one of them")
    if model.train != ("language",):
        yield Conflict(("model.expand", "model.train"), "trains the new layers alone: remove train")
    if recipe.algorithm.learning.head != "token":
        reason = f"is of models that write, and {recipe.algorithm.name} trains another head: remove it"
        yield Conflict(("model.expand", "algorithm.name"), reason)
