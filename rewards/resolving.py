"""A name or a plugin becomes a function, in the process that calls it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from rlflow.plugins import PluginError, import_plugin
from rlflow.rewards.conventions import Convention, from_verl, is_verl, of_trl

if TYPE_CHECKING:
    from rlflow.recipe import RewardBlock

REWARDS = {
    "math_accuracy": "rlflow.rewards.math_accuracy:math_accuracy",
    "exact_match": "rlflow.rewards.exact_match:exact_match",
    "last_number": "rlflow.rewards.last_number:last_number",
    "format": "rlflow.rewards.formats:pattern_format",
    "react_format": "rlflow.rewards.formats:react_format",
    "answer_format": "rlflow.rewards.formats:answer_format",
    "boxed_format": "rlflow.rewards.formats:boxed_format",
    "cosine": "rlflow.rewards.cosine:cosine",
    "repetition": "rlflow.rewards.lengths:repetition",
    "soft_overlong": "rlflow.rewards.lengths:soft_overlong",
    "environment": "rlflow.rewards.environment:environment",
    "reward_model": "rlflow.rewards.reward_model:RewardModel",
    "python_tests": "rlflow.rewards.python_tests:PythonTests",
}
"""Name -> ``module:function``, or a class whose instance is called: what it needs is loaded before the first call."""


SEEN = ("images", "videos")
"""Columns of what rows show; a call whose rows show nothing has empty lists for a function that names them."""


class RewardError(ValueError):
    """A reward of the recipe cannot be found, loaded or called with these arguments."""


class RewardFunction(Protocol):
    """What `resolve` returns: always synchronous, arguments of the recipe already bound.

    Its own parameters have no names: a column may be called ``prompts`` too, and is not passed on.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        /,
        **columns: Sequence[Any],
    ) -> Any: ...


def resolve(block: RewardBlock) -> RewardFunction:
    """Finds and loads the function of a recipe's reward.

    Args:
        block: Names a function of `REWARDS`, or a plugin ``file.py:function``. A plugin may be a class too (the form
            of ms-swift): it is constructed with ``block.args`` and its instance is called.

    Raises:
        RewardError: Unknown name, file or attribute; a plugin that fails to import; an argument that the function
            does not take, or one that it lacks.
    """
    return load(block.name, block.plugin, block.args, block.completions)


def load(name: str | None, plugin: str | None, args: Mapping[str, Any], completions: str = "auto") -> RewardFunction:
    """`resolve` for a process that does not want to import the recipe's schema.

    Args:
        completions: Whether it is given text or messages: a value of the recipe's key.
    """
    target, label = find(name, plugin)
    options: Mapping[str, inspect.Parameter] = {}
    if plugin is None:
        options = _options(target)
        _check_options(options, args, label)
    if isinstance(target, type):
        aliases = {"response_token_ids": "completion_ids"}
        return _bind(_construct(target, args, label), {}, label, aliases=aliases, completions=completions)
    if plugin is not None and is_verl(target):
        return _bind(from_verl(target, args), {}, label)
    return _bind(target, args, label, options=options, completions=completions if plugin is not None else "text")


def find(name: str | None, plugin: str | None) -> tuple[Any, str]:
    """The function or class of a reward, and what errors call it.

    Raises:
        RewardError: There is none.
    """
    if plugin is not None:
        return _load_plugin(plugin), plugin
    if name not in REWARDS:
        raise RewardError(f"no reward is called {name!r}{_nearest(str(name), REWARDS)}; there are {', '.join(REWARDS)}")
    module, _, attribute = REWARDS[name].partition(":")
    return vars(importlib.import_module(module))[attribute], name


def _load_plugin(plugin: str) -> Any:
    file, _, attribute = plugin.rpartition(":")
    path = Path(os.path.expanduser(file)).resolve()
    if not attribute or path.suffix != ".py" or not path.is_file():
        raise RewardError(f"reward plugin {plugin!r}: no such file {path}; write it as path/to/file.py:function")
    try:
        names = vars(import_plugin(path, f"reward plugin {plugin!r}"))
    except PluginError as error:
        raise RewardError(str(error)) from error.__cause__
    if attribute not in names:
        raise RewardError(f"reward plugin {plugin!r}: {path} has no {attribute!r}{_nearest(attribute, names)}")
    return names[attribute]


def _construct(target: type, args: Mapping[str, Any], label: str) -> Any:
    try:
        return target(**args)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {label!r}: constructing it raised {type(error).__name__}: {error}") from error


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a built-in function: its keyword-only parameters, so that a misspelt one is no column."""
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _check_options(options: Mapping[str, inspect.Parameter], args: Mapping[str, Any], label: str) -> None:
    for key in args:
        if key not in options:
            raise RewardError(f"reward {label!r} takes no argument {key!r}{_nearest(key, options)}")
    missing = [key for key, option in options.items() if option.default is option.empty and key not in args]
    if missing:
        raise RewardError(f"reward {label!r} needs args: {', '.join(missing)}")


def _bind(
    function: Any,
    args: Mapping[str, Any],
    label: str,
    *,
    options: Collection[str] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
    completions: str = "text",
) -> RewardFunction:
    """Wraps a function so that it gets what it names (all, where it takes ``**columns``) and is synchronous.

    Args:
        options: Parameters that the recipe alone sets: a column of such a name is not passed.
        aliases: Second names, and what is passed under them.
        completions: ``text``, ``messages``, or ``auto``: text until the function says that it takes none.
    """
    if not callable(function):
        raise RewardError(f"reward {label!r} is a {type(function).__name__}, not a function or a class of rewards")
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in args:
        if key not in named and not takes_all:
            raise RewardError(f"reward {label!r} takes no argument {key!r}{_nearest(key, named)}")

    by_convention = Convention(completions)

    def reward_function(
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        /,
        **columns: Sequence[Any],
    ) -> Any:
        offered: dict[str, Any] = {name: [[] for _ in completions] for name in SEEN if name in named}
        offered |= {name: values for name, values in columns.items() if name not in options}
        offered |= of_trl(columns)
        offered |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        offered |= {alias: offered[original] for alias, original in aliases.items()}
        offered |= args
        missing = [key for key, p in named.items() if p.default is p.empty and key not in offered]
        if missing:
            raise RewardError(
                f"reward {label!r} needs the column {missing[0]!r}; the data has {', '.join(columns) or 'none'}"
            )

        def called(completions: Any) -> Any:
            given = {**offered, "completions": completions}
            result = function(**(given if takes_all else {key: given[key] for key in named if key in given}))
            return _awaited(result) if inspect.iscoroutine(result) else result

        return by_convention(called, completions, columns)

    return reward_function


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    # Whoever only checks a recipe has no need of it.
    import asyncio

    return asyncio.run(coroutine)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(key, [k for k in known if not k.startswith("_")], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
