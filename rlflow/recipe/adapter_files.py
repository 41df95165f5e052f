"""What a PEFT directory says of its adapter, and whether we can go on from it. No torch: only files are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.recipe.model_files import read_fields
from rlflow.recipe.peft_methods import METHODS, REFUSED, TYPE, UNSUPPORTED
from rlflow.recipe.presets import ALGORITHMS
from rlflow.recipe.problems import nearest

if TYPE_CHECKING:
    from rlflow.recipe.model_blocks import AdapterBlock

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_COMMON_NAME = re.compile(
    r"final|merged|latest|best|last|model|initial_model|(checkpoints?|(global_)?step|epoch)[-_]?\d*"
)
"""Of the directories that runs leave, ours and others'; a stage is often called as its algorithm."""


def is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter and no model."""
    return (directory / CONFIG).exists() and not (directory / "config.json").exists()


def read_config(directory: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: There is none, or it cannot be read, with the remedy.
    """
    if not (directory / CONFIG).exists():
        several = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
        remedy = f", and {', '.join(several)} below it do: name {directory / several[0]}" if several else ""
        raise ValueError(f"{directory} holds no adapter: it has no {CONFIG}{remedy}")
    return read_fields(directory / CONFIG)


def base_of(config: dict[str, Any]) -> str | None:
    """The model that the adapter was trained on."""
    return config.get("base_model_name_or_path")


def config_of_adapter(adapter: AdapterBlock) -> dict[str, Any] | None:
    """PEFT's config of a new adapter or of the one it goes on from; None where that is not on this machine."""
    if adapter.path is None:
        return adapter.config
    return read_config(Path(adapter.path)) if (Path(adapter.path) / CONFIG).is_file() else None


def adapter_problem(directory: Path, model: str) -> str | None:
    """Why training on ``model`` cannot go on from this adapter, and what to do; None when it can."""
    try:
        config = read_config(directory)
    except ValueError as error:
        return str(error)
    if problem := _method_problem(config):
        return f"{directory} {problem}"
    base = base_of(config)
    if base and not same_model(base, model):
        return (
            f"{directory} is an adapter of {base}, and model.path is {model}: set model.path to that, or, where both "
            f"are the same model, correct base_model_name_or_path in {CONFIG}"
        )
    if not (directory / WEIGHTS).exists():
        return f"{directory} has no {WEIGHTS}: fetch it, or save the adapter as safetensors"
    return None


def _method_problem(config: Mapping[str, Any]) -> str | None:
    """What of an adapter's config cannot be trained on."""
    kind = str(config.get(TYPE)).upper()
    if kind not in METHODS:
        return f"holds an adapter of type {kind}, which {REFUSED.get(kind, 'is not known here: merge it')}"
    if not METHODS[kind].goes_on:
        return f"holds an adapter of type {kind}, of which a model holds one alone: merge it into its base model"
    for key, neutral in UNSUPPORTED.items():
        # What it started from has done its part.
        if key in config and not key.endswith("_config") and config[key] not in (neutral, None, False, [], {}):
            return f"was made with {key}: {config[key]}, which is not supported: merge it into its base model"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return f"was made with init_lora_weights: {start}, which changes the base: convert it with PEFT"
    return None


def mixed_kinds(directory: Path, kind: str, trained: str) -> str:
    """What is wrong with an adapter of one method beside a trained one of another."""
    return (
        f"{directory} is an adapter of type {kind}, and the trained one of type {trained}: a model holds one of the "
        "two. Merge it with `rlflow export ADAPTER OUTPUT --merge` and name that in reference.path"
    )


def unmatched_targets(targets: Collection[str], linear: Collection[str]) -> Iterator[str]:
    """A message for each target that names none of the linear layers, as PEFT matches them: by the end of the name.

    Args:
        linear: Names of the model's linear layers, but for the head, which is not adapted.
    """
    ends = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            near = nearest(target, [*ends, *linear])
            remedy = f"did you mean {near}? " if near else ""
            yield f"no linear layer beside the head is called {target} ({remedy}They are called {', '.join(ends[:12])})"


def same_model(one: str, other: str) -> bool:
    """By where they are; a hub id and a directory, or a directory of another machine, by the last part of the name that
    tells models apart, and what follows it: ``runs/a/final`` is not ``runs/b/final``."""
    paths = Path(one), Path(other)
    if all(path.is_dir() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    names = [[part.lower() for part in reversed(path.parts)] for path in paths]
    for mine, theirs in zip_longest(*names):
        if mine != theirs or not _says_little(mine):
            return mine == theirs
    return True


def _says_little(name: str) -> bool:
    """Whether directories of many models are called so."""
    return name in ALGORITHMS or _COMMON_NAME.fullmatch(name) is not None
