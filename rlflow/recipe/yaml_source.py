"""YAML in with a line for every key, YAML out that reads back the same.

Scalars follow YAML 1.2: ``1e-6`` is a number, ``yes``, ``off`` and ``12:30`` are text. A key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, ClassVar

import yaml

from rlflow.recipe.problems import Place, Problem, RecipeError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
"""Of a file. A larger one is data, or a mistake."""
MAX_VALUES = 20_000
"""Of a file, with what aliases stand for. A line of ten aliases to ten aliases, and so on, is a bomb."""
MAX_DEPTH = 50
"""Of blocks within blocks."""
_PLAIN = {f"tag:yaml.org,2002:{kind}": kind for kind in ("str", "int", "float", "bool", "null")}
"""Tags of a value that is no block."""

_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(([0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copies what `<<` names into the mapping. Copies of copies end where a bomb begins."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} keys, through `<<`", node)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
# Dates are text here, and to be text for any other reader too.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:timestamp", re.compile(r"^\d{4}-\d\d?-\d\d?"), list("0123456789"))


@dataclass(slots=True)
class Document:
    """What was given, and where every value of it stands."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    """Of every key and list item; ``()`` is the document's own."""

    def place(self, path: KeyPath) -> Place:
        """The place of the value, or of the nearest block around it that was written down."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def below(self, path: KeyPath) -> Document:
        """The part under ``path``, as a document of its own."""
        size = len(path)
        places = {key[size:]: place for key, place in self.places.items() if key[:size] == path}
        return Document(self.value(path), {(): self.place(path), **places})

    def value(self, path: KeyPath) -> Any:
        value: Any = self.data
        for part in path:
            value = value[part]
        return value

    def without(self, key: str) -> Document:
        """All but one top-level key."""
        data = {name: value for name, value in self.data.items() if name != key}
        return Document(data, {path: place for path, place in self.places.items() if path[:1] != (key,)})

    def cut_to(self, data: dict[str, Any]) -> Document:
        """The document with ``data``, a part of its own, and the places of what that still has."""
        left = set(_paths(data))
        return Document(data, {path: place for path, place in self.places.items() if path in left})

    def merged_over(self, base: Document) -> Document:
        """This document's values over those of ``base``: blocks are merged, anything else is replaced."""
        replaced = {path for path in self.places if not isinstance(self.value(path), dict)}
        kept = {
            path: place
            for path, place in base.places.items()
            if not any(path[:size] in replaced for size in range(1, len(path)))
        }
        return Document(merge(base.data, self.data), kept | self.places)


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Of a value and of everything in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def merge(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``: mappings key by key, everything else replaced. Neither is changed."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


def parse_value(text: str) -> Any:
    """One value as the recipe file would read it. Raises yaml.YAMLError."""
    problems: list[Problem] = []
    loader = _Loader(text)
    try:
        node = _compose(loader)
        value = None if node is None else _Walker(loader, "", {}, problems).value(node, ())
    finally:
        loader.dispose()
    if problems:
        raise yaml.YAMLError(problems[0].message)
    return value


def read_document(path: Path, problems: list[Problem]) -> Document:
    """Reads one file. Keys that are wrong in themselves are added to ``problems``.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or is no mapping.
    """
    file = str(path)

    def refuse(message: str, line: int | None = None) -> RecipeError:
        return RecipeError([Problem(file, line, "", message)])

    try:
        if path.stat().st_size > MAX_BYTES:
            raise refuse(f"is larger than {MAX_BYTES >> 20} MiB, which no recipe is: name the recipe's .yaml file")
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise refuse(f"is not YAML: {error}") from error
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    try:
        node = _compose(loader)
        if node is None:
            raise refuse("is empty: a recipe needs algorithm, model, data and run", 1)
        if not isinstance(node, yaml.MappingNode):
            raise refuse("holds no keys: a recipe is a mapping, `algorithm: {name: ...}` and so on", 1)
        document = Document(places={(): Place(file, 1)})
        document.data = _Walker(loader, file, document.places, problems).value(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise refuse(f"is not YAML: {reason}; look at the indentation, colons and quotes of this line", line) from error
    finally:
        loader.dispose()
    return document


def document_of(data: Mapping[str, Any], file: str) -> Document:
    """What a program gives instead of a file: its values have keys and no lines.

    Raises:
        RecipeError: A value is of a kind that no recipe can hold.
    """
    document = Document(_plain(data, (), file), {(): Place(file)})
    document.places |= {path: Place(file) for path in _paths(document.data)}
    return document


def _plain(value: Any, path: KeyPath, file: str) -> Any:
    """A value as a YAML file would have it: a copy in which tuples are lists and paths are text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key)), file) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), file) for index, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | bool | date):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    message = f"is a {type(value).__name__}: give text, a number, true or false, a list, or a mapping"
    raise RecipeError([Problem(file, None, ".".join(map(str, path)), message)])


def _compose(loader: _Loader) -> yaml.Node | None:
    try:
        return loader.get_single_node()
    except RecursionError:
        problem = f"blocks nest deeper than {MAX_DEPTH}"
        raise yaml.constructor.ConstructorError(None, None, problem, loader.get_mark()) from None


def _refusal(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def dump(data: Mapping[str, Any]) -> str:
    """YAML text in the order of ``data``, the same for the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_value(value: Any) -> str:
    """One value as it stands behind its key."""
    return dump({"v": value}).removeprefix("v:").strip()


@dataclass(slots=True)
class _Walker:
    """Turns nodes into values and notes where each stands."""

    loader: _Loader
    file: str
    places: dict[KeyPath, Place]
    problems: list[Problem]
    inside: list[yaml.Node] = field(default_factory=list)
    checked: set[int] = field(default_factory=set)
    """Mappings whose keys were checked: an alias comes by more than once, with its merges already in it."""
    count: int = 0
    """Values so far, each alias with all that it stands for."""

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} values, of aliases of aliases", node)
        if any(node is outer for outer in self.inside):
            raise _refusal("an alias that contains itself", node)
        if len(self.inside) > MAX_DEPTH:
            raise _refusal(f"blocks nest deeper than {MAX_DEPTH}", node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise _refusal(f"the tag {node.tag} is unknown", node)
        self.inside.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
        finally:
            self.inside.pop()

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _PLAIN:
            raise _refusal(f"the tag {node.tag} is unknown", node)
        self.check_text(node)
        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError):
            # An explicit tag on something else, or an integer of thousands of digits.
            shown = node.value if len(node.value) <= 20 else f"{node.value[:20]}..."
            raise _refusal(f"{shown!r} cannot be read as {_PLAIN[node.tag]}", node) from None

    def item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = Place(self.file, node.start_mark.line + 1)
        return self.value(node, path)

    def check_text(self, node: yaml.ScalarNode) -> None:
        if "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refusal("an escape for NUL or for half of a surrogate pair, which no path or text may hold", node)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if id(node) not in self.checked:
            self.checked.add(id(node))
            self.report_repeated(node, path)
        self.loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in values:
                self.forget((*path, key))
            self.places[*path, key] = Place(self.file, key_node.start_mark.line + 1)
            values[key] = self.value(value_node, (*path, key))
        return values

    def forget(self, path: KeyPath) -> None:
        """Drops the places of a value that another one replaces."""
        for inner in [key for key in self.places if key[: len(path)] == path]:
            del self.places[inner]

    def report_repeated(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("a key that is no word", key_node)
            self.check_text(key_node)
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines and key != "<<":
                dotted = ".".join(map(str, (*path, key)))
                message = f"is given twice, first on line {lines[key]}: keep one"
                self.problems.append(Problem(self.file, line, dotted, message))
            lines.setdefault(key, line)
