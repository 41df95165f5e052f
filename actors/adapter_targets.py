"""Which layers of a model an adapter's config names: those that it may be on, and names that stand for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlflow.actors.adapted_layers import layers_of_one_weight
from rlflow.actors.vision import part_finder
from rlflow.recipe.adapter_files import unmatched_targets
from rlflow.recipe.model_blocks import Part
from rlflow.recipe.peft_methods import METHODS


def check_targets(model: PreTrainedModel, config: Any) -> None:
    if (
        not isinstance(config.target_modules, set | list)
        or not METHODS[PeftType(config.peft_type).value].targets_linear
    ):
        return
    head = model.get_output_embeddings()
    layers = [(name, module) for name, module in model.named_modules() if module is not head]
    linear = [name for name, module in layers if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer)]
    if problems := list(unmatched_targets(sorted(config.target_modules), linear)):
        raise ValueError(f"model.adapter.target_modules: {'; '.join(problems)}")


def within_parts(model: PreTrainedModel, config: Any, parts: Iterable[Part]) -> list[str]:
    """Whole names of the linear layers that a config means, of these parts of a vision-language model.

    Raises:
        ValueError: There are none.
    """
    part_of, wanted, targets = part_finder(model), set(parts), config.target_modules
    ends = None if targets is None or isinstance(targets, str) else tuple(targets)
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and part_of(name) in wanted
    ]
    found = [name for name in names if ends is None or any(name == end or name.endswith(f".{end}") for end in ends)]
    if not found:
        raise ValueError(
            f"model.adapter.target_modules: none is in {', '.join(sorted(wanted))}, which model.train names"
        )
    return found


def check_layers(model: PreTrainedModel, config: PeftConfig, key: str = "model.adapter.target_modules") -> None:
    """
    Raises:
        ValueError: The head or another layer got an adapter that cannot be trained, synced and merged here.
    """
    head, shared = model.get_output_embeddings(), layers_of_one_weight(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if name in shared:
            raise ValueError(
                f"{key}: {name} has its weight together with other layers: an adapter on each cannot be merged into "
                "it; name others, or leave target_modules at all-linear, which leaves these out"
            )
        base = layer.get_base_layer()
        is_linear = isinstance(base, nn.Linear | Conv1D) or isinstance(layer, lora.ParamWrapper)
        if layer is head and not METHODS[PeftType(config.peft_type).value].targets_linear:
            method = PeftType(config.peft_type).value
            raise ValueError(f"model.adapter: {method}: the head shares the embedding's weights: train another method")
        if layer is head or (METHODS[PeftType(config.peft_type).value].targets_linear and not is_linear):
            raise ValueError(
                f"{key}: {name} ({type(base).__name__}) gets no adapter: name linear layers "
                "other than the head, such as [q_proj, k_proj, v_proj, o_proj]"
            )


def check_named(model: PreTrainedModel, config: Any, fields: Mapping[str, Any]) -> None:
    """Of a new adapter, which is in the model: PEFT passes over what of its config names nothing, with a warning.

    Args:
        fields: What the recipe gives of the config: PEFT adds patterns of its own, of experts in one parameter.

    Raises:
        ValueError: A pattern, a layer's number, an excluded layer or a parameter that stands for nothing.
    """
    if problems := [
        f"model.adapter.peft.{field}: {problem}" for field, problem in _named_in_vain(model, config, fields)
    ]:
        raise ValueError("; ".join(problems))


def _named_in_vain(model: PreTrainedModel, config: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what of it stands for nothing)."""
    fields, modules = vars(config), [name for name, _ in model.named_modules()]
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    adapted = [
        f"{name.partition('.base_layer')[0]}.{layer.parameter_name}" if isinstance(layer, lora.ParamWrapper) else name
        for name, layer in layers
    ]
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in sorted((fields.get(field) or {}).keys() & (given.get(field) or {}).keys()):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                yield field, f"no layer with an adapter ends in {pattern}: they end in {ends}, as in {adapted[0]}"
    indices = fields.get("layers_to_transform")
    for index in [indices] if isinstance(indices, int) else indices or []:
        if not any(f".{index}." in name for name in adapted):
            yield "layers_to_transform", f"no layer with an adapter is in number {index}: layers are counted from 0"
    excluded = fields.get("exclude_modules") or []
    for pattern in [excluded] if isinstance(excluded, str) else sorted(excluded):
        matches = re.compile(pattern if isinstance(excluded, str) else rf"(.*\.)?{re.escape(pattern)}").fullmatch
        if not any(map(matches, modules)):
            yield "exclude_modules", f"the model has no {pattern} to leave out"
    parameters = [re.sub(r"\.base_layer\b", "", name) for name, _ in model.named_parameters()]
    for target in sorted(fields.get("target_parameters") or []):
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            yield "target_parameters", f"the model has no parameter {target}"
