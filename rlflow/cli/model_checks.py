"""Whether a model's config is one that transformers takes, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlflow.cli.config_fields import config_fields, model_types
from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.model_files import read_fields
from rlflow.recipe.problems import nearest
from rlflow.recipe.stored_formats import format_problem, stored_format
from rlflow.recipe.token_shares import split_problem
from rlflow.roles import rollout_engine

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


def config_problem(directory: Path) -> str | None:
    """What is wrong with a model directory's config.json, which exists."""
    path = directory / "config.json"
    try:
        config = read_fields(path)
    except ValueError as error:
        return str(error)
    kind, kinds = config.get("model_type"), model_types()
    if isinstance(kind, str) and kinds and kind not in kinds and "auto_map" not in config:
        near = nearest(kind, list(kinds))
        remedy = f"did you mean {near}?" if near else "a newer transformers may"
        return f"{path}: transformers knows no model {kind} ({remedy})"
    return f"{path}: {problem}" if (problem := split_problem(config)) else None


def in_formats(recipe: Recipe, models: Mapping[str, str | None]) -> Found:
    """Weights in few bits that nobody can start from, or that engines would hold otherwise than trainers.

    Args:
        models: Paths by the keys that name them.
    """
    adapter = recipe.model.adapter
    for key, path in models.items():
        method = None if path is None else _format_of(path)
        if path is None or method is None:
            continue
        is_policy = key == "model.path"
        has_adapter = adapter is not None and is_policy
        rounds = adapter is not None and is_policy and adapter.quantize != "none"
        if problem := format_problem(path, method, has_adapter=has_adapter, rounds=rounds):
            yield key, problem
        elif is_policy and recipe.trains and recipe.needs_rollouts and rollout_engine(recipe) != "torch":
            reason = f"would hold {path} in {method}'s format, which the trainer reads as the numbers it stands for"
            yield "rollout.engine", f"{rollout_engine(recipe)} {reason}: set torch, or name a model in full precision"


def _format_of(path: str) -> str | None:
    """Of a directory that is here."""
    try:
        return stored_format(read_fields(Path(path) / "config.json"))
    except ValueError:
        return None


def in_expansion(model: ModelBlock, config: Mapping[str, Any] | None) -> Found:
    """What keeps a model with these fields of a config from getting new layers; nothing where nobody knows them."""
    num_layers = (config or {}).get("num_hidden_layers")
    if model.expand is not None and isinstance(num_layers, int) and (problem := model.expand.problem(num_layers)):
        yield "model.expand.new_layers" if model.expand.groups is None else "model.expand.groups", problem


def in_architecture(architecture: Mapping[str, Any]) -> Found:
    """Of a new model: a field that its config does not know would be left at its default, a wrong one fail late."""
    kind, kinds = architecture["model_type"], model_types()
    if kinds and kind not in kinds:
        near = nearest(kind, list(kinds))
        remedy = f"did you mean {near}?" if near else "e.g. qwen3"
        yield "model.architecture.model_type", f"transformers knows no model {kind} ({remedy})"
        return
    fields = config_fields(kind) or {}
    wrong = False
    for name, value in architecture.items():
        key = f"model.architecture.{name}"
        if fields and name not in fields:
            # What is like no field may be one of a model's code alone.
            if near := nearest(name, fields, cutoff=0.85):
                yield key, f"a {kind} has no such field (did you mean {near}?)"
        elif fields and not _is_of(value, fields[name]):
            wrong = True
            yield key, f"must be {' or '.join(sorted(fields[name] & _TYPES.keys()))}, is {value}"
        elif type(value) is int and value < 1 and (name.startswith("num_") or name.endswith("_size")):
            wrong = True
            yield key, f"must be more than 0, is {value}"
    if not wrong and (problem := split_problem(architecture)):
        yield "model.architecture", problem


def _is_of(value: Any, types: frozenset[str]) -> bool:
    """Whether a value has one of a field's types; yes where some of them are more than plain values."""
    if not types or not types <= {*_TYPES, *(f"{a} | {b}" for a in _TYPES for b in _TYPES)}:
        return True
    return any(type(value) is _TYPES[name] for name in types & _TYPES.keys())
