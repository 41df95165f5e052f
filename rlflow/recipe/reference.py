"""What every key means: the schema's docstrings as options of a block, and as docs/recipe.md.

``python -m rlflow.recipe.reference > docs/recipe.md`` writes the page anew.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from rlflow.recipe.algorithm import UnknownBlock
from rlflow.recipe.block import LARGEST, Block, blocks_in
from rlflow.recipe.docstrings import meaning
from rlflow.recipe.explain import blocks_at

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
are those of the named row where it has them: `rlflow algorithms NAME`. A block of several kinds (`loss.kind`,
`advantage.estimator`, `correction.mode`, `preference.loss`) is of the row's kind until a recipe names another one; then
it has that kind's defaults, but for what all kinds have, and options of the kind before it are left behind.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One key with its value and what it means."""

    key: str
    """Dotted, from the block that was asked for."""
    value: Any
    default: Any
    """Of the schema, whatever the row has."""
    block: type[Block]
    """That it belongs to."""

    @property
    def doc(self) -> str:
        """What it means."""
        return meaning(self.block, self.key.rpartition(".")[2])


def options(block: Block, prefix: str = "") -> Iterator[Option]:
    """Every key of a block and of the blocks in it, in the order of the schema."""
    for name, info in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, Block):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield Option(f"{prefix}{name}", value, info.default, type(block))


def markdown() -> str:
    """The reference page."""
    sections = []
    for path, blocks in _sections().items():
        sections.append(f"## `{path}`" if path else "## Blocks")
        shared = set.intersection(*(set(_rows(path, block)) for block in blocks))
        for block, choice in blocks.items():
            own = [row for row in _rows(path, block) if row not in shared]
            if own and len(blocks) > 1:
                sections += [f"{choice[0].upper()}{choice[1:]}:", _table(own)]
        if rows := [row for row in _rows(path, next(iter(blocks))) if row in shared]:
            sections += ["All of them:", _table(rows)] if len(blocks) > 1 else [_table(rows)]
    return "\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n"


@cache
def _sections() -> dict[str, dict[type[Block], str]]:
    """The classes of blocks, by the first path that has them, as in ``blocks_at``."""
    sections: dict[str, dict[type[Block], str]] = {}
    for path, blocks in blocks_at().items():
        seen = {block for of_path in sections.values() for block in of_path}
        if new := {block: choice for block, choice in blocks.items() if block not in seen}:
            sections[path] = new
    return sections


def _rows(path: str, block: type[Block]) -> Iterator[str]:
    hints = typing.get_type_hints(block, include_extras=True)
    for name, info in block.model_fields.items():
        if (path, name) != ("", "stage"):
            yield f"| `{name}` | {_words(hints[name])} | {_default(info)} | {meaning(block, name)} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _words(hint: Any) -> str:
    """A type in a reader's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([_words(arguments[0]), " and ".join(_bounds(arguments[1:]))]).strip()
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = (
            argument for argument in arguments if argument is not type(None) and UnknownBlock not in blocks_in(argument)
        )
        return " or ".join(dict.fromkeys(map(_words, kinds)))
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_words(argument) for argument in arguments)}]"
    if origin is dict:
        return "mapping"
    if issubclass(hint, Block):
        path = next(path for path, blocks in _sections().items() if hint in blocks)
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
