"""Which of a model's linear layers get no adapter where all are meant."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def layers_left_out(model: nn.Module) -> list[str]:
    """Names of linear layers, by their class, on which an adapter would have no effect or fail."""
    return [*_read_by_kernels(model), *_other_than_linear(model), *layers_of_one_weight(model)]


def layers_of_one_weight(model: nn.Module) -> list[str]:
    """Names of linear layers that have one weight with others, as Zamba's shared blocks: each with an adapter of its
    own, they are several weights once they are merged, which the model has no place for."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear) and not name.endswith(".base_layer") and module is not head:
            names[id(layer.weight)].append(name)
    return [name for same in names.values() if len(same) > 1 for name in same]


def _read_by_kernels(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weights Mamba's kernels multiply by themselves: an adapter on one has no effect
    and no gradient where there are such kernels."""
    # Of all layers with a state, Mamba's alone have D.
    mixers = [name.removesuffix(".D") for name, _ in model.named_parameters() if name.endswith(".D")]
    layers = dict(model.named_modules())
    return [f"{name}.out_proj" for name in mixers if f"{name}.out_proj" in layers]


@torch.no_grad()
def _other_than_linear(model: nn.Module) -> list[str]:
    """Names of layers that transformers has made of linear ones and that compute something else, such as Llama 4's
    routers and DeepSeek-V4's grouped projections."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        # Quantised layers are other packages'.
        if type(module).__module__.startswith("transformers.models."):
            row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
            try:
                output: Any = module(row)
            # Its code is transformers', and takes other shapes than a linear layer does.
            except (RuntimeError, TypeError, ValueError):
                output = None
            if not isinstance(output, torch.Tensor) or output.shape != (1, module.out_features):
                found.append(name)
    return found
