"""The flags that a command gives, and the recipe in the making."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from rlflow.recipe.foreign.rows import Row, Table, find_row
from rlflow.recipe.yaml_source import parse_value
from rlflow.tracking.redact import MASK, is_secret_name


@dataclass(frozen=True, slots=True)
class Note:
    """Something to say of the conversion."""

    kind: Literal["trap", "missing", "to do", "unneeded", "default"]
    text: str


@dataclass(slots=True)
class Given:
    """The flags of a command, with the framework's defaults, and which of them have been looked at."""

    values: dict[str, Any]
    """As written, or out of a YAML file."""
    table: Table
    spelled: Callable[[str, Any], str]
    """How the user wrote a flag: ``--beta 0.04``, ``algorithm.lam=1``."""
    looked_at: set[str] = field(default_factory=set)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        """The value, read as YAML, or the framework's default."""
        self.looked_at.add(name)
        if name in self.values:
            return plain(self.values[name])
        row = find_row(self.table, name)
        assert row is not None, f"{name} is not in the table"
        return row.default

    def text(self, name: str) -> str:
        """The flag as the user wrote it; of one that was not given, its default in brackets."""
        self.looked_at.add(name)
        if name in self.values:
            return self.spelled(name, self.values[name])
        row = find_row(self.table, name)
        return f"({self.spelled(name, row.default if row else None)}, the default)"

    def texts(self, *names: str) -> str:
        """Those of the flags that were given, or all when none was."""
        given = [name for name in names if name in self.values]
        self.looked_at |= set(names)
        return ", ".join(map(self.text, given or names[:1]))

    def unknown(self) -> list[str]:
        return [name for name in self.values if find_row(self.table, name) is None]


@dataclass(slots=True)
class Draft:
    """The recipe in the making: dotted keys, each with where it comes from, and what else there is to say."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def set(self, name: str, value: Any, why: str = "") -> None:
        """Sets a key; None leaves it out."""
        if value is None:
            return
        self.values[name] = value
        self.why[name] = why

    def note(self, kind: Literal["trap", "missing", "to do", "unneeded", "default"], text: str) -> None:
        if Note(kind, text) not in self.notes:
            self.notes.append(Note(kind, text))


def plain(value: Any) -> Any:
    """A value as it was written, as YAML reads it; a list of one is itself a value where one word was given."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in ("None", "null"):
        return None
    try:
        read = parse_value(value)
    except yaml.YAMLError:
        return value
    return value if isinstance(read, dict) and not value.lstrip().startswith("{") else read


def apply_rows(given: Given, draft: Draft, family: str) -> None:
    """Sets the keys of all flags that are one, and says what the others are."""
    for name in dict.fromkeys([*given.values, *(n for n, row in given.table.items() if row.default is not None)]):
        row = find_row(given.table, name)
        if row is None or (row.kind == "fold"):
            continue
        is_given = name in given
        if not is_given and row.key in draft.values:
            continue
        if row.family and row.family != family:
            if is_given:
                draft.note("unneeded", f"{given.text(name)}: nothing to {_of(family)}")
            continue
        value = given[name]
        if row.kind == "key":
            _set(given, draft, name, row, value)
        elif row.kind == "unneeded":
            draft.note("unneeded", f"{given.text(name)}: {row.note}")
        elif _is_neutral(value, row.neutral):
            draft.note("unneeded", f"{given.text(name)}: off here as well")
        else:
            draft.note("missing", f"{given.text(name)}: {row.note}")


def _of(family: str) -> str:
    return {"online": "rollouts", "sft": "supervised training"}.get(family, "preference training")


def _is_neutral(value: Any, neutral: Iterable[Any]) -> bool:
    return any(value is other or (value == other and type(value) is type(other)) for other in neutral) or value == 0.0


def _set(given: Given, draft: Draft, name: str, row: Row, value: Any) -> None:
    try:
        read = value if row.read is None else row.read(value)
    except ValueError as error:
        draft.note("missing", f"{given.text(name)}: {error}")
        return
    except (TypeError, KeyError):
        draft.note("missing", f"{given.text(name)}: no such value of {row.key}")
        return
    if read is None:
        return
    why = given.text(name)
    draft.set(row.key, read, f"{why}: {row.note}" if row.note else why)


def flags_of(words: Iterable[str], table: Table) -> tuple[dict[str, Any], list[str]]:
    """``--name value value``, ``--name=value``, ``--name`` and ``--no-name`` as a mapping, and the words before them.

    A flag of several values is a list; one without a value is true.
    """
    values: dict[str, Any] = {}
    before: list[str] = []
    name: str | None = None
    for word in words:
        if re.match(r"--?[A-Za-z]", word) and not re.match(r"-\d", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name if "." in name else name.replace("-", "_")
            if find_row(table, name) is None and name.startswith("no_") and find_row(table, name[3:]) is not None:
                name, value, equals = name[3:], "false", "="
            values[name] = value if equals else "true"
            started = bool(equals)
        elif name is None:
            before.append(word)
        elif not started:
            values[name], started = word, True
        else:
            earlier = values[name]
            values[name] = [*(earlier if isinstance(earlier, list) else [earlier]), word]
    return values, before


def walk(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(name: str, value: Any) -> str:
    """A value on one line; of a token or a key, nothing."""
    if isinstance(value, str) and (is_secret_name(name) or name.endswith("webhook_url")):
        return MASK
    if isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
