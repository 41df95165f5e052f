"""Names of weights in a checkpoint and in the model that transformers makes of it.

    in the model, in trainers, in their saved state       in checkpoints and weight syncs, and what vLLM expects
    model.layers.0.mlp.experts.gate_up_proj [E, 2 I, H]   model.layers.0.mlp.experts.7.gate_proj.weight [I, H]
                                                          model.layers.0.mlp.experts.7.up_proj.weight [I, H]
    model.layers.0.mlp.experts.down_proj [E, H, I]        model.layers.0.mlp.experts.7.down_proj.weight [H, I]

transformers keeps a layer's experts together, in a shape of its own that its releases may change. It has the conversion
of each architecture, which is used here in both directions. Models without experts have one set of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Named = Iterable[tuple[str, torch.Tensor]]


def to_checkpoint(model: PreTrainedModel, weights: Named) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights of ``model`` under the names of its architecture's checkpoints.

    Args:
        weights: By their names in the model, in its order: no more than a layer is held at a time.
    """
    conversions = _conversions(model)
    if not conversions:
        yield from weights
        return
    # Where a model came from does not matter: what is sent depends on its architecture alone.
    architecture: Any = SimpleNamespace(config=model.config, _weight_conversions=conversions)
    others: dict[str, torch.Tensor] = {}
    for layer, members in groupby(weights, key=lambda pair: _layer_of(pair[0])):
        if layer is None:
            others.update(members)
        else:
            yield from revert_weight_conversion(architecture, dict(members)).items()
    yield from revert_weight_conversion(architecture, others).items()


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model's files have beside its parameters: numbers that its forward pass reads and training leaves alone,
    as the biases by which the routers of DeepSeek-V3 and GLM-4.5 choose experts. By their names in the model."""
    for prefix, module in model.named_modules():
        # PEFT's layers keep an adapter's numbers; engines of whole models need not import it.
        if type(module).__module__.startswith("peft."):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer.detach()


def to_model(model: PreTrainedModel, weights: Named, *, are_kept: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse: what checkpoints keep apart is put together. Names that mean nothing to the model are left alone.

    Args:
        are_kept: The tensors stay what they are when the next is asked for; else those that wait for others are copied.
    """
    conversions = _conversions(model)
    if not conversions:
        yield from weights
        return
    renamings = [change for change in conversions if isinstance(change, WeightRenaming)]
    converters = [change for change in conversions if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: list[tuple[str, str, str, torch.Tensor]] = []
    for name, tensor in weights:
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            yield renamed, tensor
        else:
            parts.append((name, renamed, pattern, tensor if are_kept else tensor.clone()))
    gathered: dict[str, WeightConverter] = {}
    for name, renamed, pattern, tensor in sorted(parts, key=lambda part: dot_natural_key(part[0])):
        if renamed not in gathered:
            gathered[renamed] = deepcopy(by_pattern[pattern])
        gathered[renamed].add_tensor(renamed, name, pattern, tensor)  # pyright: ignore[reportArgumentType]
    for renamed, converter in gathered.items():
        for name, tensors in converter.convert(renamed, model=model, config=model.config).items():
            yield name, tensors[0] if isinstance(tensors, list) else tensors


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    # Prefixes are not of the architecture but of the class that wrote a checkpoint.
    return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]


def _layer_of(name: str) -> str | None:
    """``model.layers.0`` of a parameter in it; None outside of all layers."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found and found[1]
