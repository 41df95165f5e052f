"""``key=value`` from the command line, or a mapping from Python, on top of what the files say."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlflow.recipe.problems import Place, Problem
from rlflow.recipe.yaml_source import Document, KeyPath, merge, parse_value

Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """One value to set."""

    path: tuple[str, ...]
    value: Any
    place: Place

    def problem(self, message: str) -> Problem:
        return Problem.at(self.place, ".".join(self.path), message)


def parse_overrides(overrides: Overrides, problems: list[Problem]) -> list[Change]:
    """``a.b.c=value`` each, the value read as YAML; or dotted keys to values. What cannot be read is a problem."""
    if isinstance(overrides, Mapping):
        place = Place("overrides")
        return [Change(tuple(key.split(".")), value, place) for key, value in overrides.items()]
    if isinstance(overrides, str):
        overrides = [overrides]
    changes, place = [], Place("command line")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(Problem.at(place, text, "is no override: write key=value, e.g. run.steps=10"))
            continue
        try:
            changes.append(Change(tuple(key.split(".")), parse_value(value), place))
        except yaml.constructor.ConstructorError as error:
            problems.append(Problem.at(place, key, f"cannot be read: {error.problem}"))
        except yaml.reader.ReaderError as error:
            problems.append(Problem.at(place, key, f"has U+{ord(value[error.position]):04X}, which is no text"))
        except yaml.YAMLError:
            shown = value if len(value) <= 60 else f"{value[:60]}..."
            problems.append(Problem.at(place, key, f"{shown} is not YAML: put quotes around the whole key=value"))
    return changes


def apply(document: Document, changes: Sequence[Change], problems: list[Problem]) -> Document:
    """A copy of ``document`` with the changes made, in order."""
    changed = Document(copy.deepcopy(document.data), dict(document.places))
    for change in changes:
        if (refusal := _apply_one(changed, change)) is not None:
            problems.append(change.problem(refusal))
    return changed


def _apply_one(document: Document, change: Change) -> str | None:
    """Sets one value. Returns why it cannot be set, or None."""
    here: Any = document.data
    path: tuple[Any, ...] = ()
    for part in change.path:
        name = ".".join(map(str, path))
        is_list = isinstance(here, list)
        if not is_list and not isinstance(here, dict):
            return f"{name} is a value, not a block: {part} cannot be set in it"
        if is_list and not (part.isdecimal() and int(part) < len(here)):
            return f"{name} is a list of {len(here)}: give a place from 0 to {len(here) - 1}, not {part}"
        container: Any = here
        key: Any = int(part) if is_list else part
        path = (*path, key)
        if len(path) == len(change.path):
            container[key] = merge(container[key] if is_list or key in container else None, change.value)
            _note(document, path, change)
        elif not is_list and (key not in container or container[key] is None):
            container[key] = {}
            document.places[path] = change.place
        here = container[key]
    return None


def _note(document: Document, path: KeyPath, change: Change) -> None:
    """Notes that the value at ``path``, and every key it brings, comes from ``change``."""
    if not isinstance(change.value, dict):
        document.places = {key: place for key, place in document.places.items() if key[: len(path)] != path}
    pending = [(path, change.value)]
    while pending:
        inner, value = pending.pop()
        document.places[inner] = change.place
        if isinstance(value, dict):
            pending += [((*inner, key), item) for key, item in value.items()]
