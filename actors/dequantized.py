"""Checkpoints in few bits, read as the numbers that they stand for: what is trained is a plain model, or beside one.

transformers leaves some formats as they are, in layers that round what goes through them: such a layer passes no
gradient on, and holds scales beside its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

_READERS: dict[str, Any] = {
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}
"""By ``quant_method``; those in `rlflow.recipe.stored_formats.DEQUANTIZED`."""
_OF_A_PLAIN_LAYER = ("weight", "bias")


def as_numbers(method: str) -> Any:
    """What ``from_pretrained`` takes as its ``quantization_config`` to read a format as numbers."""
    return _READERS[method](dequantize=True)


def make_plain(model: PreTrainedModel, dtype: Any) -> None:
    """Takes away what the format has left on a model whose weights are numbers by now, all of which may be trained.

    Args:
        dtype: As ``from_pretrained`` took it; experts come in bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _make_layer_plain(module)
    for parameter in model.parameters():
        if isinstance(dtype, torch.dtype):
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _make_layer_plain(module: nn.Module) -> None:
    """Of compressed-tensors, which replaces a layer's forward by one that rounds its input."""
    module.__dict__.pop("forward", None)
    for name in ("quantization_scheme", "quantization_status"):
        delattr(module, name)
    for tensors in (module._parameters, module._buffers):
        for name in [name for name in tensors if name not in _OF_A_PLAIN_LAYER]:
            del tensors[name]
