"""Relative paths in a recipe become absolute: an actor's working directory is not the user's.

A path is looked up from the current directory, then from the file it is written in. Hub ids and inline templates are
told apart from files and left as they are. ``~``, ``$NAME`` and ``${NAME}`` are read as a shell reads them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rlflow.recipe.problems import Problem
from rlflow.recipe.yaml_source import Document, KeyPath

_HUB_OR_LOCAL = {
    "model.path",
    "model.adapter.path",
    "reference.path",
    "reference.adapter",
    "algorithm.critic.path",
    "teacher.path",
    "data.train.path",
    "demonstrations.train.path",
    "evaluation.data.path",
}
_REWARD_MODELS = {"rewards.args.path", "evaluation.reward.args.path"}
"""Where the reward's name is reward_model; another function's `path` is its own affair."""
_FUNCTIONS = {
    "rewards.plugin",
    "evaluation.reward.plugin",
    "data.train.generator",
    "demonstrations.train.generator",
    "evaluation.data.generator",
    "callbacks",
    "callbacks.plugin",
    "metrics",
    "metrics.plugin",
    "algorithm.advantage.estimator",
    "algorithm.advantage.plugin",
    "algorithm.loss.kind",
    "algorithm.loss.plugin",
    "algorithm.preference.loss",
    "algorithm.preference.plugin",
    "trainer.optimizer.kind",
    "trainer.optimizer.plugin",
    "environment.plugin",
    "environment.tools",
}
_TEMPLATES = {"model.chat_template"}
_OUTPUT = {"run.output_dir"}
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")

_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ".gguf")
_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


def make_absolute(document: Document, problems: list[Problem]) -> dict[str, Any]:
    """A copy of the document's data with absolute paths. A variable that is not set is a problem."""
    return _copy(document, document.data, (), problems)


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist here can only be the hub's: a name, or ``organisation/name``."""
    if path.startswith((".", "~", "/")) or path.endswith(_FILE_SUFFIXES) or path.count("/") > 1:
        return False
    organisation, slash, name = path.partition("/")
    return bool(organisation) and (not slash or (bool(name) and not os.path.isdir(organisation)))


def expand(path: str) -> str:
    """The path with the environment's variables and the user's home in it, as a shell reads it.

    Raises:
        ValueError: A variable is not set, or there is no path.
    """
    if not path:
        raise ValueError("is empty: write a path, or remove the line")
    if os.path.lexists(path):
        return path  # a file may well be called $x
    for plain, braced in _VARIABLE.findall(path):
        if (name := plain or braced) not in os.environ:
            raise ValueError(f"the environment has no variable {name}: set it, or write the path out")
    return os.path.expanduser(os.path.expandvars(path))


def _copy(document: Document, value: Any, path: KeyPath, problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return {key: _copy(document, item, (*path, key), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(document, item, (*path, index), problems) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        return _resolved(document, value, path)
    except ValueError as error:
        problems.append(Problem.at(document.place(path), ".".join(map(str, path)), str(error)))
        return value


def _resolved(document: Document, value: str, path: KeyPath) -> str:
    """A text of the recipe; where its key says that it is a path, an absolute one. Raises ValueError, see `expand`."""
    name = ".".join(part for part in path if isinstance(part, str))
    directory = Path(document.place(path).file).parent
    if name in _OUTPUT:
        return _absolute(expand(value))
    if name in _FUNCTIONS and ":" in value:
        file, _, function = expand(value).rpartition(":")
        if name == "environment.tools" and not file.endswith(".py"):
            return value  # module:function
        return f"{_found(file, directory) or _absolute(file)}:{function}"
    if name in _TEMPLATES and not ("{{" in value or "{%" in value):
        value = expand(value)
        return _found(value, directory) or (_absolute(value) if value.endswith(_TEMPLATE_SUFFIXES) else value)
    if name in _HUB_OR_LOCAL or (name in _REWARD_MODELS and _is_reward_model(document.value(path[:-2]))):
        value = expand(value)
        return _found(value, directory) or (value if is_hub_id(value) or "://" in value else _absolute(value))
    return value


def _is_reward_model(reward: dict[str, Any]) -> bool:
    return "name" in reward and reward["name"] == "reward_model"


def _found(path: str, directory: Path) -> str | None:
    """The absolute path of what exists, seen from here or else from ``directory``."""
    for candidate in (_absolute(path), os.path.abspath(directory / path)):
        if os.path.exists(candidate):
            return candidate
    return None


def _absolute(path: str) -> str:
    return os.path.abspath(path)
