"""How reward functions of other projects want to be called: TRL's messages, verl's ``compute_score``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlflow.rewards.ground_truth import ground_truth

OF_EPISODES = ("turns", "tool_calls", "num_turns", "environment_reward", "environment_state")
"""What functions get of rollouts in an environment, by name."""
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What verl gives a function, by name."""
_OF_TEXT = ("string indices must be integers", "'str' object has no attribute 'get'")
"""What Python says where text is taken for messages."""


def as_messages(completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[list[dict[str, Any]]]:
    """Each completion as the messages that follow the prompt: all turns of an episode, or one of the assistant."""
    if columns.keys() >= set(OF_EPISODES):
        return [list(messages) for messages in columns["turns"]]
    return [[{"role": "assistant", "content": text}] for text in completions]


class EndedEnvironment:
    """An environment at its end as TRL's reward functions read it: what it keeps of its state, as attributes."""

    def __init__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, Mapping) else {"state": state})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{name!r} is not kept of an environment; kept are public attributes that JSON can hold, here "
            f"{', '.join(vars(self)) or 'none'}: rename it, or give the environment a method get_reward"
        )


def of_trl(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[EndedEnvironment]]:
    """What TRL gives its functions beside the columns: ``environments``, where there are some."""
    if "environments" in columns or not columns.keys() >= set(OF_EPISODES):
        return {}
    return {"environments": [EndedEnvironment(state) for state in columns["environment_state"]]}


class Convention:
    """Whether a function is given text or messages; ``auto``: text, until it says that it takes none."""

    def __init__(self, completions: str) -> None:
        self._kind = completions

    def __call__(
        self, call: Callable[[Any], Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Any:
        """What a call returns.

        Args:
            call: Calls the function with its completions.
        """
        if self._kind == "messages":
            return call(as_messages(completions, columns))
        try:
            return call(completions)
        except (TypeError, AttributeError) as error:
            if self._kind != "auto" or not any(words in str(error) for words in _OF_TEXT):
                raise
            result = call(as_messages(completions, columns))
            self._kind = "messages"
            return result


def is_verl(function: Any) -> bool:
    """Whether a function is written for verl: its parameters are called as there."""
    return callable(function) and {"solution_str", "ground_truth"} <= inspect.signature(function).parameters.keys()


def from_verl(compute_score: Callable[..., Any], args: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward function that asks a ``compute_score`` for each row.

    Its ground truth is the column of that name, or of verl's ``reward_model``, or ``solution``. It returns a number, or
    a mapping with a ``score``. Of an episode ``extra_info`` has verl's ``num_turns`` as well, which counts the prompt
    and what was heard too.
    """
    parameters = inspect.signature(compute_score).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def reward_function(
        prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Sequence[Any]
    ) -> list[Any]:
        scores = []
        for row, text in enumerate(completions):
            own = {name: values[row] for name, values in columns.items()}
            given = own.get("ground_truth", own.get("reward_model", own.get("solution")))
            offered = {
                "data_source": own.get("data_source", ""),
                "solution_str": text,
                "ground_truth": ground_truth(given),
                "extra_info": _extra_info(own),
                **{name: own[name] for name in OF_EPISODES if name in own},
                **args,
            }
            score = compute_score(**{name: offered[name] for name in offered if takes_all or name in parameters})
            scores.append(score["score"] if isinstance(score, Mapping) else score)
        return scores

    return reward_function


def _extra_info(own: Mapping[str, Any]) -> Any:
    if not own.keys() >= set(OF_EPISODES):
        return own.get("extra_info")
    roles = [message["role"] for message in own["turns"]]
    num_heard = sum(before == "assistant" != after for before, after in pairwise(roles))
    return {**(own.get("extra_info") or {}), "num_turns": 1 + roles.count("assistant") + num_heard}
