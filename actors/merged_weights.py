"""The whole weights that a model with an adapter amounts to, for engines that know nothing of the adapter's method.

A layer at a time is merged as PEFT does it, in copies of its tensors: what is trained and the base stay as they are, to
the bit. What FSDP has shared out is gathered for as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from rlflow.actors.checkpoint_names import kept_buffers


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint has of the base, by names without the adapter, each with what the adapter makes of it.

    Every rank takes part, with its own shards alone; all read the same.
    """
    layers = list(_outermost(model))
    adapted = {id(parameter) for _, layer in layers for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapted:
            yield name, _whole(parameter)
    inside = tuple(f"{name}." for name, _ in layers)
    yield from ((name, buffer) for name, buffer in kept_buffers(model) if not name.startswith(inside))
    for name, layer in layers:
        dtypes = {part: parameter.dtype for part, parameter in layer.get_base_layer().named_parameters()}
        with _merged(layer):
            # Taking the adapter out again works in place.
            base = layer.get_base_layer()
            merged = {
                part: tensor.detach().to(dtypes.get(part, tensor.dtype), copy=True)
                for part, tensor in chain(base.named_parameters(), kept_buffers(base))
            }
        for part, tensor in merged.items():
            yield f"{name}.{part}", tensor


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that are in no other of them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            yield name, module


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """Within, the layer holds copies of its tensors, and the base's have the adapter in them."""
    before = [
        (module, dict(module._parameters), dict(module._buffers), dict(module._modules)) for module in layer.modules()
    ]
    parts = [part for part in layer.modules() if isinstance(part, BaseTunerLayer)]
    # One that takes away what the other adds would leave what was rounded in between.
    are_several = any(len(part.active_adapters) > 1 for part in parts)
    for module, parameters, buffers, _ in before:
        for name, parameter in parameters.items():
            if parameter is not None:
                copy = _whole(parameter).clone()
                module._parameters[name] = nn.Parameter(copy.float() if are_several else copy, requires_grad=False)
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    for part in reversed(parts):
        part.merge()
    try:
        yield
    finally:
        for part in parts:
            part.unmerge()
        for module, parameters, buffers, modules in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module._modules.update(modules)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
