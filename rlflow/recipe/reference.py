"""What every key means: the schema's docstrings as options of a block, and as docs/recipe.md.

``python -m rlflow.recipe.reference > docs/recipe.md`` writes the page anew.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from pydantic.fields import FieldInfo

from rlflow.recipe.block import LARGEST, Block
from rlflow.recipe.explain import block_classes

INTRODUCTION = """# Recipe reference

Every block and key of a recipe, with its default. This page is generated from the schema:
`python -m rlflow.recipe.reference > docs/recipe.md`.

A recipe is YAML. An unknown key, a wrong type or values that do not go together are errors with file and line, all of
them at once. Beside the blocks below, a file may have:

* `extends: other.yaml`: start from that file (relative to this one). Blocks are merged key by key, lists are replaced.
* `stages:`: a list of `{name: ..., <blocks>}`, run one after the other. Each is merged over the blocks outside the
  list; an `algorithm` with another name replaces the shared one. A stage that names no model starts from the one
  before, and its results go to `<run.output_dir>/<name>`.

On the command line, `trainer.learning_rate=2e-6` sets a key, `rewards.0.weight=2` reaches into a list, and
`stages.sft.run.steps=50` sets it for one stage. Relative paths are looked up from the current directory, then from
the file that names them; `~`, `$NAME` and `${NAME}` in a path are what a shell makes of them. Defaults of `algorithm`
are those of the named row where it has them: `rlflow algorithms NAME`. An option of `algorithm` that would have no
effect, in this row or beside the others that are set, stays at its default.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One key with its value and what it means."""

    key: str
    """Dotted, from the block that was asked for."""
    value: Any
    doc: str


def options(block: Block, prefix: str = "") -> Iterator[Option]:
    """Every key of a block and of the blocks in it, in the order of the schema."""
    for name, info in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, Block):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield Option(f"{prefix}{name}", value, doc_of(info))


def doc_of(info: FieldInfo) -> str:
    """A field's docstring on one line."""
    return " ".join((info.description or "").split())


def markdown() -> str:
    """The reference page."""
    sections = []
    for block, path in _sections().items():
        hints = typing.get_type_hints(block, include_extras=True)
        keys = [(name, info) for name, info in block.model_fields.items() if (path, name) != ("", "stage")]
        rows = [f"| `{name}` | {_words(hints[name])} | {_default(info)} | {doc_of(info)} |" for name, info in keys]
        title = f"## `{path}`" if path else "## Blocks"
        sections.append("\n".join([title, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n".join([INTRODUCTION, "\n\n".join(sections), ""])


def _sections() -> dict[type[Block], str]:
    """Every kind of block, by the first place it has in a recipe."""
    first: dict[type[Block], str] = {}
    for path, block in block_classes().items():
        first.setdefault(block, path)
    return first


def _words(hint: Any) -> str:
    """A type in a reader's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([_words(arguments[0]), " and ".join(_bounds(arguments[1:]))]).strip()
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_words(argument) for argument in arguments)}]"
    if origin is dict:
        return "mapping"
    if issubclass(hint, Block):
        path = _sections()[hint]
        return f"[`{path}`](#{path.replace('.', '')}) block"
    return {int: "integer", float: "number", str: "text", date: "date", bool: "`true`, `false`"}[hint]


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for item in metadata:
        for constraint in item.metadata if isinstance(item, FieldInfo) else ():
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(constraint, name) and getattr(constraint, name) != LARGEST:
                    yield f"{sign} {getattr(constraint, name):g}"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, Block) or value in ([], {}, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, int | str) else f"`[{', '.join(map(str, value))}]`"


if __name__ == "__main__":
    print(markdown(), end="")
