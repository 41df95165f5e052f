"""The recipe's environment block: what answers the policy, and when an episode ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rlflow.recipe.block import Block, Conflict, NonNegativeInt, PositiveFloat, PositiveInt, malformed_function

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe

_FUNCTION = re.compile(r"[\w.]+:\w+")


class EnvironmentBlock(Block):
    name: str | None = None
    """An adapter: verifiers, openenv or reasoning_gym, see docs/environments.md."""
    plugin: str | None = None
    """Your own class, `file.py:Class`, with reset(row) and step(message); or with TRL's reset and tools as methods."""
    tools: list[str] = Field(default_factory=list)
    """Functions that the policy may call, `file.py:function` or `module:function`, with type hints and docstrings."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment."""
    max_turns: PositiveInt = 8
    """Completions of an episode; it then ends, over or not."""
    max_tokens: PositiveInt | None = None
    """Of an episode behind its prompt, the environment's included; max_turns times rollout.max_new_tokens when
    absent."""
    timeout_s: PositiveFloat = 30.0
    """A step longer than this is killed, and its episode with it, which is then unscored."""
    episode_timeout_s: PositiveFloat = 600.0
    """An episode that is older than this at the end of a turn ends there."""
    memory_gib: PositiveFloat = 0.9
    """What the environment of one episode may allocate."""
    variables: list[str] = Field(default_factory=list)
    """Environment variables that it gets beside the usual ones (see docs/rewards.md), e.g. [SEARCH_API_KEY]."""
    call_parser: str = "auto"
    """How calls are read from the policy's text: as the tokenizer or the chat template writes them, or by the vLLM
    tool parser of this name."""
    max_restarts: NonNegativeInt = 3
    """So often in a run the process that episodes start from may end by itself."""

    @property
    def files(self) -> dict[str, str]:
        """The user's files that it names, by key."""
        named = {"plugin": self.plugin or "", **{f"tools.{index}": tool for index, tool in enumerate(self.tools)}}
        parts = {key: name.rpartition(":")[0] for key, name in named.items()}
        return {key: file for key, file in parts.items() if file.endswith(".py")}

    def conflicts(self) -> Iterator[Conflict]:
        given = [key for key in ("name", "plugin", "tools") if getattr(self, key)]
        if len(given) != 1:
            reason = f"give name, plugin or tools{', not several' if given else ''}"
            yield Conflict((given[0] if given else "plugin",), reason)
        elif self.plugin is not None:
            yield from malformed_function("plugin", self.plugin)
        for index, tool in enumerate(self.tools):
            if not _FUNCTION.fullmatch(tool) and list(malformed_function("tools", tool)):
                yield Conflict((f"tools.{index}",), f"{tool} is not of the form file.py:function or module:function")
        if self.tools and self.args:
            yield Conflict(("args", "tools"), "tools have no arguments of a recipe: remove them")


def environment_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with ``environment``, or without."""
    block, rollout = recipe.environment, recipe.rollout
    uses_reward = [index for index, reward in enumerate(recipe.rewards) if reward.name == "environment"]
    if block is None:
        for index in uses_reward:
            yield Conflict((f"rewards.{index}.name", "environment"), "is an environment's, and there is none: add one")
        return
    if not recipe.needs_rollouts:
        yield Conflict(
            ("environment", "algorithm.name"),
            f"{recipe.algorithm.name} generates nothing: remove it, or move it to the stage that does",
        )
    if block.max_tokens is not None and block.max_tokens < rollout.max_new_tokens:
        reason = f"{block.max_tokens} is less than one turn may have ({rollout.max_new_tokens}): raise it"
        yield Conflict(("environment.max_tokens", "rollout.max_new_tokens"), reason)
    if block.timeout_s >= rollout.timeout_s:
        reason = f"a worker is taken for lost after {rollout.timeout_s:g} s without a step: lower it, or raise that"
        yield Conflict(("environment.timeout_s", "rollout.timeout_s"), reason)
