"""The whole weights that a model with an adapter amounts to, for engines that know nothing of the adapter's method.

A layer at a time is merged as PEFT does it, read, and put back to the bit: merging and taking it out again would move
the base a little each time. A layer that FSDP has shared out is whole for as long as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

_BASE = "base_layer."


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's parameters by their names without the adapter, each with what the adapter makes of it.

    Every rank takes part; all read the same.
    """
    units: list[tuple[str, Any]] = [
        (name, unit) for name, unit in model.named_modules() if isinstance(unit, FSDPModule)
    ]
    inner = {name for name, _ in units if name}
    for name, unit in units or [("", model)]:
        if isinstance(unit, FSDPModule):
            unit.unshard()
        elsewhere = tuple(f"{other}." for other in inner if other != name)
        yield from _merged(unit, f"{name}." if name else "", elsewhere)
        if isinstance(unit, FSDPModule):
            unit.reshard()


def _merged(unit: nn.Module, prefix: str, elsewhere: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of one unit, but for what is in units of its own: ``elsewhere``, by how their names begin."""
    layers = [
        (f"{prefix}{name}", layer) for name, layer in _outermost(unit) if not f"{prefix}{name}.".startswith(elsewhere)
    ]
    adapted = {id(parameter) for _, layer in layers for parameter in layer.parameters()}
    for name, parameter in unit.named_parameters(prefix=prefix.removesuffix(".")):
        if id(parameter) not in adapted and not name.startswith(elsewhere):
            yield name, parameter.detach()
    for name, layer in layers:
        with _merged_layer(layer):
            for part, parameter in layer.get_base_layer().named_parameters():
                yield f"{name}.{part}", parameter.detach().clone()


def _outermost(unit: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that are in no other of them."""
    inside: tuple[str, ...] = ()
    for name, module in unit.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            yield name, module


@contextmanager
def _merged_layer(layer: Any) -> Iterator[None]:
    """Within, the base layer's weights are those with the adapter. Afterwards all is as it was, to the bit."""
    tensors = [*layer.parameters(), *layer.buffers()]
    before = [(tensor, tensor.data, tensor.data.clone()) for tensor in tensors]
    parts = [part for part in layer.modules() if isinstance(part, BaseTunerLayer)]
    for part in reversed(parts):
        part.merge()
    try:
        yield
    finally:
        for part in parts:
            part.unmerge()
        for tensor, storage, values in before:
            storage.copy_(values)
            tensor.data = storage
