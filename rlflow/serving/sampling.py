"""How answers are drawn where nobody says otherwise: as the run drew them, or as the model's authors advise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlflow.recipe import Recipe
from rlflow.types import SamplingParams

HUGGING_FACE_TOP_K = 50
"""What transformers' ``generate`` cuts at where a generation config samples and does not say."""


_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a person or a client may say of how an answer is drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    max_new_tokens: int | None = None
    """Longest answer; as much as the model's context holds when None."""
    seed: int | None = None
    """The same seed gives the same answer; a new one for each when None."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """1 is none."""
    ends: tuple[str, ...] = ()
    """An answer ends with the first of these, as the rollouts of a run do."""

    def given(self, **values: Any) -> Sampling:
        """With these values in the place of its own, where they are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def params(self, stop_token_ids: tuple[int, ...], room: int) -> SamplingParams:
        """As engines take it.

        Args:
            room: Tokens that the context has left.
        """
        longest = room if self.max_new_tokens is None else min(self.max_new_tokens, room)
        return SamplingParams(
            longest,
            self.temperature,
            self.top_p,
            self.top_k,
            stop_token_ids,
            self.min_p,
            self.repetition_penalty,
            self.ends,
        )


def defaults_of(recipe: Recipe | None, generation_config: Mapping[str, Any]) -> Sampling:
    """The sampling of a run that generated, or what a model's generation_config.json advises: greedy unless it says
    ``do_sample``, as transformers reads it."""
    if recipe is not None and recipe.needs_rollouts:
        rollout = recipe.rollout
        return Sampling(
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            rollout.max_new_tokens,
            min_p=recipe.sampling.min_p,
            repetition_penalty=recipe.sampling.repetition_penalty,
            ends=tuple(recipe.sampling.stop),
        )
    longest = generation_config.get("max_new_tokens")
    if not generation_config.get("do_sample"):
        return Sampling(temperature=0.0, max_new_tokens=longest)
    values = {name: generation_config.get(name) for name in _ADVISED}
    return Sampling(top_k=HUGGING_FACE_TOP_K).given(**values)
