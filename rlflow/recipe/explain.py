"""Validation errors in plain English, with the place of the key and the remedy."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlflow.recipe.algorithm import BLOCKS, AlgorithmBlock, UnknownBlock, rows_of
from rlflow.recipe.block import LATER, Block, blocks_in, kinds_in
from rlflow.recipe.docstrings import meaning
from rlflow.recipe.foreign.names import foreign_row
from rlflow.recipe.presets import ALGORITHMS
from rlflow.recipe.problems import Problem, nearest
from rlflow.recipe.schema import Recipe
from rlflow.recipe.yaml_source import Document, KeyPath

ELSEWHERE = {"batch_size": "data.prompts_per_step", "zero_stage": "trainer.deepspeed.stage"}
"""Names for our keys that stand in no table of another framework (see foreign/)."""

_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "text",
    "bool": "true or false",
    "list": "a list, with `- ` before each item or in [ ]",
    "tuple": "a list",
    "dict": "a block of keys",
    "model": "a block of keys",
}


def validate(document: Document, problems: list[Problem]) -> Recipe | None:
    """The recipe, or None when something is wrong with it: then ``problems`` grows by all of it.

    Keys that are wrong are left out for a second look, so that values that do not go together are found as well.
    """
    try:
        recipe = Recipe.model_validate(document.data, context=LATER)
    except ValidationError as failure:
        errors = [(_without_tags(error["loc"], document.data), error) for error in failure.errors()]
        for path, error in errors:
            key = (*path, error.get("ctx", {})["discriminator"].strip("'")) if "union_tag" in error["type"] else path
            problems.append(Problem.at(document.place(key), dotted(key), _explain(key, error, document.data)))
        try:
            recipe = Recipe.model_validate(_pruned(document.data, [path for path, _ in errors]), context=LATER)
        except ValidationError:
            return None
        wrong = {_named(path) for path, _ in errors}
        unknown = [path for path, error in errors if error["type"] == "extra_forbidden"]
        wrong |= {key for path in unknown for key in _meant(path, document.data)}
        problems += _conflicts(recipe, document, wrong)
        return None
    found = _conflicts(recipe, document, set())
    problems += found
    return None if found else recipe


def _conflicts(recipe: Recipe, document: Document, wrong: set[str]) -> list[Problem]:
    """What does not go together, but for what may only follow from the keys in ``wrong``."""
    found = []
    for path, block in _blocks_of(recipe):
        for conflict in block.conflicts():
            keys = [
                (*path, *(int(part) if part.isdigit() else part for part in key.split("."))) for key in conflict.keys
            ]
            if not any(_overlap(_named(key), other) for key in keys for other in wrong):
                given = next((key for key in keys if key in document.places), keys[0])
                found.append(Problem.at(document.place(given), dotted(keys[0]), conflict.reason))
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


@cache
def blocks_at() -> dict[str, dict[type[Block], str]]:
    """The classes of blocks by dotted path, list indices left out: ``algorithm.kl``, ``rewards``, ``data.train``.

    Where a path has several, each with what decides for it: ``loss.kind clip``, ``dpo, cpo, simpo, orpo``.
    """
    found: dict[str, dict[type[Block], str]] = {}
    for path, block, choice in _walk("", Recipe, ""):
        before = found.setdefault(path, {}).get(block)
        found[path][block] = choice if before in (None, choice) else f"{before}, {choice}"
    return found


def _walk(path: str, block: type[Block], choice: str) -> Iterator[tuple[str, type[Block], str]]:
    yield path, block, choice
    for field, info in block.model_fields.items():
        kinds = kinds_in(block).get(field)
        for inner in dict.fromkeys(blocks_in(info.annotation)):
            names = [name for name, kind in kinds.names.items() if kind is inner] if kinds else []
            of_inner = f"{field}.{kinds.key} {', '.join(names)}" if kinds else choice
            if inner is not UnknownBlock:
                is_row = issubclass(inner, AlgorithmBlock)
                yield from _walk(_join(path, field), inner, rows_of(inner) if is_row else of_inner)


def _blocks_of(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Block]]:
    if isinstance(value, Block):
        yield path, value
        for name in type(value).model_fields:
            yield from _blocks_of(getattr(value, name), (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _blocks_of(item, (*path, index))


def _without_tags(location: tuple[int | str, ...], data: Any) -> KeyPath:
    """pydantic's place of an error as keys and list indices: it names the kind of a block as well."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(data, list) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif isinstance(data, dict) and (part in data or is_last):
            data = data.get(part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _pruned(data: Any, paths: list[KeyPath]) -> Any:
    """A copy of ``data`` without the values at ``paths``; a list that loses an item is left out whole."""
    here = {path[0] for path in paths if len(path) == 1}
    if isinstance(data, list):
        return [] if here else [_pruned(item, _under(paths, index)) for index, item in enumerate(data)]
    if isinstance(data, dict):
        return {key: _pruned(value, _under(paths, key)) for key, value in data.items() if key not in here}
    return data


def _under(paths: list[KeyPath], part: int | str) -> list[KeyPath]:
    return [path[1:] for path in paths if path[:1] == (part,) and len(path) > 1]


def _explain(path: KeyPath, error: ErrorDetails, data: Any) -> str:
    kind, value = error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, data)
    if kind == "union_tag_invalid":
        kind, value, context = "literal_error", value[path[-1]], {"expected": context["expected_tags"]}
    if kind == "missing":
        return f"is missing: {_meaning(path)}" if isinstance(path[-1], str) else "has too few values"
    if kind == "value_error":
        return str(context["error"])
    if value is None:
        return "has no value: give one, or remove the line"
    if kind == "literal_error":
        elsewhere = _belonging(path, data, value) if isinstance(path[-1], str) else ""
        return _not_among(value, str(context["expected"])) + (f" ({_shown(value)} {elsewhere})" if elsewhere else "")
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}, is {_shown(value)}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"must be a whole number, is {_shown(value)}: write {int(value)}"
    if kind == "too_long":
        return f"has {context['actual_length']} values, at most {context['max_length']} are possible"
    expected = next((words for word, words in _EXPECTED.items() if kind.startswith(word)), None)
    if expected is None:
        return error["msg"]
    hint = ": put it in quotes" if kind.startswith("string") and not isinstance(value, dict | list) else ""
    return f"must be {expected}, is {_shown(value)}{hint}"


def _meaning(path: KeyPath) -> str:
    """What a key is that is missing."""
    owners = [block for block in blocks_at()[_named(path[:-1])] if path[-1] in block.model_fields]
    return meaning(owners[0], str(path[-1]))


def _named(path: KeyPath) -> str:
    """The dotted path without list indices."""
    return dotted(tuple(part for part in path if isinstance(part, str)))


def _given_to(path: KeyPath, data: Any) -> type[Block]:
    """The class of the block at ``path`` of what was given."""
    block: type[Block] = Recipe
    for part in path:
        data = data[part]
        if part == "algorithm":
            block = BLOCKS[ALGORITHMS[data["name"]].objective]
        elif isinstance(part, str):
            kinds = kinds_in(block).get(part)
            block = (kinds and kinds.of(data)) or next(blocks_in(block.model_fields[part].annotation))
    return block


def _meant(path: KeyPath, data: Any) -> list[str]:
    """The dotted keys that an unknown one may stand for, likeliest first."""
    key, here = str(path[-1]), _named(path[:-1])
    keys = {owner: [name for block in blocks for name in block.model_fields] for owner, blocks in blocks_at().items()}
    keys[""] += ["extends", "stages"]
    own = list(_given_to(path[:-1], data).model_fields) if here else keys[""]
    owners = sorted((owner for owner, of_owner in keys.items() if key in of_owner), key=lambda owner: owner.count("."))
    foreign = foreign_row(key, _family(data))
    found = [_join(owner, key) for owner in owners if foreign is None or owner == here or _is_there(owner, key, data)]
    near = None if foreign is not None else nearest(key, own, cutoff=0.8) or nearest(key, keys[here], cutoff=0.8)
    if near is not None:
        found.insert(0, _join(here, near))
    if found or key in ELSEWHERE:
        return found or [ELSEWHERE[key]]
    if foreign is not None:
        return [foreign.key] if foreign.key else []
    owner_of = {name: owner for owner, of_owner in keys.items() for name in of_owner}
    if near := nearest(key, owner_of, cutoff=0.8):
        return [_join(owner_of[near], near)]
    near = nearest(key, own)
    return [_join(here, near)] if near else []


def _family(data: Any) -> str:
    """The family of the algorithm that was given; online where there is none that is known."""
    given = data.get("algorithm") if isinstance(data, dict) else None
    name = given.get("name") if isinstance(given, dict) else None
    return ALGORITHMS[name].family if isinstance(name, str) and name in ALGORITHMS else "online"


def _is_there(owner: str, key: str, data: Any) -> bool:
    """Whether the algorithm that was given has a block, of the kind that has the key, where the block is an
    algorithm's."""
    top, _, block = owner.partition(".")
    given = data.get("algorithm") if isinstance(data, dict) else None
    if top != "algorithm" or not block or not isinstance(given, dict) or given.get("name") not in list(ALGORITHMS):
        return True
    row, field = ALGORITHMS[given["name"]], block.partition(".")[0]
    kinds = kinds_in(BLOCKS[row.objective]).get(field)
    if kinds is None:
        return field in BLOCKS[row.objective].model_fields
    said = given.get(field)
    kind = kinds.of({**row.defaults.get(field, {}), **(said if isinstance(said, dict) else {})})
    return kind is None or key in kind.model_fields


def _unknown_key(path: KeyPath, data: Any) -> str:
    key, here, meant = str(path[-1]), _named(path[:-1]), _meant(path, data)
    foreign = foreign_row(key, _family(data))
    if foreign is not None and foreign.note and meant in ([], [foreign.key]):
        if not meant or foreign.kind in ("unneeded", "missing"):
            return f"unknown key here ({foreign.note}{f'; see {foreign.key}' if meant else ''})"
        return f"unknown key here (did you mean {foreign.key.removeprefix(f'{here}.')}? It {foreign.note}.)"
    if not meant:
        return f"unknown key; keys here are {', '.join(_given_to(path[:-1], data).model_fields)}"
    if _join(here, key) in meant:
        return f"{_belonging(path, data)}: remove it"
    owners = [full.rpartition(".")[0] for full in meant if _last(full) == key]
    remedies = []
    for near in (full for full in meant if _last(full) != key):
        remedies.append(f"did you mean {near.removeprefix(f'{here}.')}?")
        if near.rpartition(".")[0] == here and _last(near) not in _given_to(path[:-1], data).model_fields:
            remedies.append(f"It {_belonging((*path[:-1], _last(near)), data)}.")
    if owners:
        shown = ", ".join(f"`{owner}`" if owner else "the top level" for owner in owners[:4])
        remedies.append(f"{key} belongs to {shown}")
    return f"unknown key here ({' '.join(remedies)})"


def _belonging(path: KeyPath, data: Any, value: Any = None) -> str:
    """Which kinds of the block around a key have it, or may have ``value`` there, and which kind it is; or nothing."""
    blocks, given = blocks_at()[_named(path[:-1])], _given_to(path[:-1], data)
    fields = {choice: block.model_fields.get(str(path[-1])) for block, choice in blocks.items() if block is not given}
    owners = [
        choice
        for choice, info in fields.items()
        if info is not None and (value is None or value in typing.get_args(info.annotation))
    ]
    return f"belongs to {', '.join(owners)}, not to {blocks[given]}" if owners else ""


def _join(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _last(dotted_key: str) -> str:
    return dotted_key.rpartition(".")[2]


def _not_among(value: Any, expected: str) -> str:
    words = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    near = nearest(value, words) if isinstance(value, str) else None
    among = f"must be one of {', '.join(words)}; is" if len(words) > 1 else f"must be {words[0].lower()}, is"
    return f"{among} {_shown(value)}" + (f" (did you mean {near}?)" if near else "")


def _shown(value: Any) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    return text if len(text) <= 60 else f"{text[:57]}..."
