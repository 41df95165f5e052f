"""What a recipe's adapter names must exist: layers of its base, the adapter it goes on from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlflow import memory
from rlflow.recipe import AdapterBlock, Recipe
from rlflow.recipe.adapter_files import (
    CONFIG,
    adapter_problem,
    base_of,
    config_of_adapter,
    mixed_kinds,
    read_config,
    unmatched_targets,
)
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.peft_methods import METHODS, TYPE, method_of

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""


def in_adapter(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """``to_come``: the directory that each earlier stage will write, and the stage."""
    adapter, base, reference = recipe.model.adapter, recipe.model.path, recipe.reference
    if reference.adapter is not None and (reference.path or base):
        yield from _on_disk("reference.adapter", reference.adapter, str(reference.path or base), to_come)
        yield from _of_one_kind(recipe, reference.adapter)
    if adapter is None or base is None:
        return
    if adapter.path is not None:
        yield from _on_disk("model.adapter.path", adapter.path, base, to_come)
    yield from _in_targets(adapter, Path(base))


def _on_disk(key: str, path: str, base: str, to_come: Mapping[str, Recipe]) -> Found:
    """An adapter of ``base``, or what an earlier stage will write."""
    if path in to_come:
        if to_come[path].model.adapter is None:
            whole = key.replace("adapter.path", "path").replace("reference.adapter", "reference.path")
            yield key, f"{path} will be a whole model: name it in {whole}"
    elif Path(path).exists():
        if problem := adapter_problem(Path(path), base):
            yield key, problem
    elif not is_hub_id(path):
        yield key, f"there is no directory {path}"


def _of_one_kind(recipe: Recipe, path: str) -> Found:
    """A trainer that holds the reference's adapter beside its own has one method for both."""
    adapter = recipe.model.adapter
    if adapter is None or recipe.places_reference or not (Path(path) / CONFIG).is_file():
        return
    try:
        configs = read_config(Path(path)), config_of_adapter(adapter)
    except ValueError:
        return  # said of its own key
    if configs[1] is not None and TYPE in configs[0] and TYPE in configs[1]:
        kinds = [method_of(config) for config in configs if config is not None]
        if kinds[0] != kinds[1]:
            yield "reference.adapter", mixed_kinds(Path(path), kinds[0], kinds[1])


def _in_targets(adapter: AdapterBlock, base: Path) -> Found:
    """Layers that the base has not."""
    try:
        config = config_of_adapter(adapter)
    except ValueError:
        return  # said of its path
    if config is None or TYPE not in config or method_of(config) not in METHODS:
        return
    key = "path" if adapter.path is not None else "target_modules" if adapter.peft is None else "peft.target_modules"
    targets = config.get("target_modules")
    if isinstance(targets, list) and METHODS[method_of(config)].targets_linear and (linear := _linear_layers(base)):
        for message in unmatched_targets(targets, linear):
            where = f"{adapter.path} is on more than linear layers: " if key == "path" else ""
            yield f"model.adapter.{key}", f"{where}{message}"


def used_as_model(key: str, path: str) -> str:
    """What to do about an adapter in the place of a model."""
    try:
        base = base_of(read_config(Path(path)))
    except ValueError:
        base = None
    return _as_model(key, path, f"{path} holds an adapter of {base or 'another model'}, not a model", base)


def to_come_as_model(key: str, path: str, stage: Recipe) -> Found:
    """The same of a stage that has not run yet."""
    if stage.model.adapter is not None:
        base = stage.model.path
        yield key, _as_model(key, path, f"{path} will be an adapter of {base}, not a model", base)


def _as_model(key: str, path: str, what: str, base: str | None) -> str:
    go_on = f"set model.path: {base or 'that'} and model.adapter.path: {path}, or " if key == "model.path" else ""
    return f"{what}: {go_on}merge it with `rlflow export {shlex.quote(path)} OUTPUT --merge`"


def _linear_layers(directory: Path) -> list[str]:
    """Names of matrices in the weight files, but for embeddings and head; none when there are no files here."""
    try:
        shapes = memory.stored_shapes(directory)
    except memory.UnknownShape:
        return []
    ends = ("lm_head", "embed_tokens", "wte", "wpe", "embed_in", "embed_out")
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    return [name for name in names if not name.endswith(ends)]
