"""A name or a plugin becomes a function, in the process that calls it."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
    "reward_model": "rlflow.rewards.reward_model:RewardModel",
}
"""Name -> ``module:function``, or a class whose instance is called: what it needs is loaded before the first call."""


class RewardError(ValueError):
    """A reward of the recipe cannot be found, loaded or called with these arguments."""


class RewardFunction(Protocol):
    """What `resolve` returns: always synchronous, arguments of the recipe already bound."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
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
    return load(block.name, block.plugin, block.args)


def load(name: str | None, plugin: str | None, args: Mapping[str, Any]) -> RewardFunction:
    """`resolve` for a process that does not want to import the recipe's schema."""
    if plugin is not None:
        target, label = _load_plugin(plugin), plugin
    elif name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        target, label = vars(importlib.import_module(module))[attribute], name
        _check_options(target, args, label)
    else:
        raise RewardError(f"no reward is called {name!r}{_nearest(str(name), REWARDS)}; there are {', '.join(REWARDS)}")
    if isinstance(target, type):
        return _bind(_construct(target, args, label), {}, label, {"response_token_ids": "completion_ids"})
    return _bind(target, args, label, {})


def _load_plugin(plugin: str) -> Any:
    file, _, attribute = plugin.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not attribute or path.suffix != ".py" or not path.is_file():
        raise RewardError(f"reward plugin {plugin!r}: no such file {path}; write it as path/to/file.py:function")
    specification = importlib.util.spec_from_file_location(f"reward_plugin_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    sys.path.append(str(path.parent))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward plugin {plugin!r}: importing it raised {type(error).__name__}: {error}") from error
    if attribute not in vars(module):
        raise RewardError(f"reward plugin {plugin!r}: {path} has no {attribute!r}{_nearest(attribute, vars(module))}")
    return vars(module)[attribute]


def _construct(target: type, args: Mapping[str, Any], label: str) -> Any:
    try:
        return target(**args)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {label!r}: constructing it raised {type(error).__name__}: {error}") from error


def _check_options(function: Callable[..., Any], args: Mapping[str, Any], label: str) -> None:
    """Built-in functions take their options as keyword-only parameters, so that a misspelt one is no column."""
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key in args:
        if key not in options:
            raise RewardError(f"reward {label!r} takes no argument {key!r}{_nearest(key, options)}")
    missing = [key for key, option in options.items() if option.default is option.empty and key not in args]
    if missing:
        raise RewardError(f"reward {label!r} needs args: {', '.join(missing)}")


def _bind(function: Any, args: Mapping[str, Any], label: str, aliases: Mapping[str, str]) -> RewardFunction:
    """Wraps a function so that it gets what it names (all, where it takes ``**columns``) and is synchronous."""
    if not callable(function):
        raise RewardError(f"reward {label!r} is a {type(function).__name__}, not a function or a class of rewards")
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in args:
        if key not in named and not takes_all:
            raise RewardError(f"reward {label!r} takes no argument {key!r}{_nearest(key, named)}")

    def reward_function(
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Any:
        offered = dict(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        offered |= {alias: offered[original] for alias, original in aliases.items()}
        offered |= args
        missing = [key for key, p in named.items() if p.default is p.empty and key not in offered]
        if missing:
            raise RewardError(
                f"reward {label!r} needs the column {missing[0]!r}; the data has {', '.join(columns) or 'none'}"
            )
        result = function(**(offered if takes_all else {key: offered[key] for key in named if key in offered}))
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    return reward_function


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(key, [k for k in known if not k.startswith("_")], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
