"""Relative paths in a recipe become absolute: an actor's working directory is not the user's.

A path is looked up from the current directory, then from the file it is written in. Hub ids and inline templates are
told apart from files and left as they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlflow.recipe.yaml_source import Document, KeyPath

_HUB_OR_LOCAL = {
    "model.path",
    "model.adapter.path",
    "reference.path",
    "algorithm.critic.path",
    "data.train.path",
    "evaluation.data.path",
}
_REWARD_MODELS = {"rewards.args.path", "evaluation.reward.args.path"}
"""Where the reward's name is reward_model; another function's `path` is its own affair."""
_FUNCTIONS = {"rewards.plugin", "evaluation.reward.plugin", "data.train.generator", "evaluation.data.generator"}
_TEMPLATES = {"model.chat_template"}

_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ".gguf")
_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


def make_absolute(document: Document) -> dict[str, Any]:
    """A copy of the document's data with absolute paths."""
    return _copy(document, document.data, ())


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist here can only be the hub's: a name, or ``organisation/name``."""
    if path.startswith((".", "~", "/")) or path.endswith(_FILE_SUFFIXES) or path.count("/") > 1:
        return False
    organisation, slash, name = path.partition("/")
    return bool(organisation) and (not slash or (bool(name) and not os.path.isdir(organisation)))


def _copy(document: Document, value: Any, path: KeyPath) -> Any:
    if isinstance(value, dict):
        return {key: _copy(document, item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(document, item, (*path, index)) for index, item in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    name = ".".join(part for part in path if isinstance(part, str))
    directory = Path(document.place(path).file).parent
    if name in _HUB_OR_LOCAL or (name in _REWARD_MODELS and _is_reward_model(document.value(path[:-2]))):
        return _found(value, directory) or (value if is_hub_id(value) or "://" in value else _absolute(value))
    if name in _FUNCTIONS and ":" in value:
        file, _, function = value.rpartition(":")
        return f"{_found(file, directory) or _absolute(file)}:{function}"
    if name in _TEMPLATES and "{" not in value:
        return _found(value, directory) or (_absolute(value) if value.endswith(_TEMPLATE_SUFFIXES) else value)
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
    return os.path.abspath(os.path.expanduser(path))
