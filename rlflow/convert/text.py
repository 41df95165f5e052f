"""A draft as a recipe file: the keys that differ from rlflow's defaults, each with the flag that it comes from."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from rlflow.convert.given import Draft, walk
from rlflow.recipe.algorithm import with_defaults
from rlflow.recipe.explain import validate
from rlflow.recipe.problems import Place, Problem
from rlflow.recipe.schema import Recipe
from rlflow.recipe.yaml_source import Document, dump_value

_WIDTH = 120
_IN_FLOW = re.compile(r"[,\[\]{}?#&*!|>%@`\"']|: ")
"""What a text that stands among others on a line is put in quotes for."""
_TITLES = {
    "trap": "Look at this first",
    "to do": "To do",
    "missing": "No counterpart",
    "default": "Where the defaults differ",
    "unneeded": "Nothing to set",
}
_ALWAYS = ("algorithm.name", "model.path", "data.train", "run.", "rewards", "data.prompts_per_step")


def render(draft: Draft, title: str) -> str:
    """The recipe as YAML, with comments."""
    lines = list(_wrapped(title))
    for kind in ("trap", "to do"):
        lines += _section(draft, kind)
    lines += _blocks(_nested(_in_order(draft.values)), draft.why, "", 0)
    for kind in ("missing", "default", "unneeded"):
        lines += _section(draft, kind)
    return "\n".join(lines) + "\n"


def _section(draft: Draft, kind: str) -> Iterator[str]:
    texts = _gathered([note.text for note in draft.notes if note.kind == kind])
    if texts:
        yield f"# {_TITLES[kind]}:"
    for text in texts:
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent="# - ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _gathered(texts: list[str]) -> list[str]:
    """The texts, flags of which the same is said in one."""
    flags: dict[str, list[str]] = {}
    for text in texts:
        flag, colon, said = text.partition(": ")
        flags.setdefault(said if colon else text, []).append(flag if colon else "")
    return [f"{', '.join(dict.fromkeys(given))}: {said}" if any(given) else said for said, given in flags.items()]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as blocks."""
    nested: dict[str, Any] = {}
    for name in values:
        block, parts = nested, name.split(".")
        for part in parts[:-1]:
            block = block.setdefault(part, {})
        block[parts[-1]] = values[name]
    return nested


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    """The keys as the reference of recipes has them."""
    recipe = resolved(values)
    known = [] if recipe is None else [name for name, _ in walk(recipe.model_dump(mode="json"))]
    blocks = list(Recipe.model_fields)

    def place(name: str) -> tuple[int, int]:
        return blocks.index(name.partition(".")[0]), known.index(name) if name in known else len(known)

    return {name: values[name] for name in sorted(values, key=place)}


def _blocks(block: dict[str, Any], why: dict[str, str], path: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, value in block.items():
        full = f"{path}{name}"
        if isinstance(value, dict) and full not in why:
            yield f"{indent}{name}:"
            yield from _blocks(value, why, f"{full}.", depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}:{_comment(why.get(full, ''))}"
            yield from (f"{indent}  - {{{', '.join(f'{k}: {_flow(v)}' for k, v in item.items())}}}" for item in value)
        elif isinstance(value, str) and "\n" in value:
            yield f"{indent}{name}: |-{_comment(why.get(full, ''))}"
            yield from (f"{indent}  {line}".rstrip() for line in value.split("\n"))
        else:
            yield from _line(f"{indent}{name}: {_flow(value)}", why.get(full, ""), indent)


def _line(text: str, why: str, indent: str) -> Iterator[str]:
    """A key with its comment behind it, or above it where both do not fit on a line."""
    if len(text) + len(why) + 4 <= _WIDTH:
        yield text + _comment(why)
        return
    yield from textwrap.wrap(
        why,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield text


def _comment(why: str) -> str:
    return f"  # {' '.join(why.split())}" if why else ""


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_flow(inner)}' for name, inner in value.items())}}}"
    text = dump_value(value)
    is_plain = isinstance(value, str) and text == value
    return json.dumps(value, ensure_ascii=False) if is_plain and _IN_FLOW.search(value) else " ".join(text.split("\n"))


def without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The keys without those that change nothing."""
    whole = resolved(values)
    if whole is None:
        return dict(values)
    kept = dict(values)
    for name in values:
        without = {key: value for key, value in kept.items() if key != name}
        if not name.startswith(_ALWAYS) and resolved(without) == whole:
            kept = without
    return kept


def resolved(values: dict[str, Any]) -> Recipe | None:
    """The recipe that the keys are; None where they are none."""
    return _validated(values, [])


def problems_of(values: dict[str, Any]) -> list[Problem]:
    """What `rlflow plan` would say of the keys before it looks at files."""
    problems: list[Problem] = []
    _validated(values, problems)
    return problems


def _validated(values: dict[str, Any], problems: list[Problem]) -> Recipe | None:
    data = _nested(values)
    algorithm = data.get("algorithm", {})
    if algorithm.get("name"):
        data["algorithm"] = with_defaults(algorithm)
    return validate(Document(data, {(): Place("recipe")}), problems)
