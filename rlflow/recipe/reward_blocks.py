"""The recipe's reward blocks: what is good, and who computes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    PositiveInt,
    exactly_one,
    malformed_function,
)

_LABEL = re.compile(r"[A-Za-z0-9_.-]+")


class RewardBlock(Block):
    name: str | None = None
    """A function of rewards/, see docs/rewards.md."""
    plugin: str | None = None
    """Your own, `file.py:function`; called as fn(prompts, completions, completion_ids, **columns)."""
    label: str = ""
    """What metrics, rollout files and the report call it; the function's name when absent. Two rewards of one function
    need one each."""
    weight: Number = 1.0
    """Its share of the reward."""
    timeout_s: PositiveFloat = 10.0
    """A call longer than this is killed; the rollout is then unscored."""
    prompts_per_call: PositiveInt = 1
    """Prompts whose completions come in one call; more let a model score them in batches."""
    completions: Literal["auto", "text", "messages"] = "auto"
    """What `completions` are: text, or messages as TRL passes where data is conversational. auto: text, and messages to
    a function that takes no text (it looks for `["content"]`)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of every call."""

    @model_validator(mode="before")
    @classmethod
    def _is_called_like_its_function(cls, given: Any) -> Any:
        """Fills in the label that was not given; what is wrong with the other keys is found later."""
        if not isinstance(given, dict) or given.get("label") not in (None, ""):
            return given
        function = given.get("name") or str(given.get("plugin") or "").rpartition(":")[2]
        return {**given, "label": function} if isinstance(function, str) else given

    def conflicts(self) -> Iterator[Conflict]:
        if (self.name is None) == (self.plugin is None):
            yield Conflict(("name", "plugin"), exactly_one(name=self.name, plugin=self.plugin))
        elif self.plugin is not None and (malformed := list(malformed_function("plugin", self.plugin))):
            yield from malformed
        elif self.label != self.name and not _LABEL.fullmatch(self.label):
            yield Conflict(("label",), f"{self.label!r} is part of metrics' names: use letters, digits, _, - and .")


class RewardServerBlock(Block):
    workers: PositiveInt = 1
    """RewardServer actors."""
    children: PositiveInt = 1
    """Killable child processes of each."""
    memory_gib: PositiveFloat = 0.9
    """What one child may allocate, all its functions together; reward_model holds its weights in float32."""
    cpus_per_worker: NonNegativeFloat = 0.0
    """Ray CPUs each reserves."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs each reserves, where its children hold their reward models; without, they are on the CPU."""
    environment: list[str] = Field(default_factory=list)
    """Variables that reward functions get beside the usual ones (see docs/rewards.md), e.g. [OPENAI_API_KEY]."""
    max_error_fraction: Fraction = 0.5
    """The run stops when more of a step's rollouts than this are unscored because a function failed."""
