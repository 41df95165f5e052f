"""Weights as a trainer sends them, checked before an engine takes any."""

from __future__ import annotations

from itertools import chain

import torch

from rlflow.actors.checkpoint_names import kept_buffers, to_checkpoint


def weight_shapes(model_dir: str, trust_remote_code: bool) -> dict[str, torch.Size]:
    """What a trainer of this model sends: a checkpoint's names, tied ones once."""
    from transformers import AutoConfig

    from rlflow.actors.vision import language_model_class

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = language_model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    sent = chain(model.named_parameters(), kept_buffers(model))
    return {name: tensor.shape for name, tensor in to_checkpoint(model, sent)}


def check_weights(tensors: list[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError for a name that is not in ``shapes``, for another shape, and for a weight that was left out."""
    for name, tensor in tensors:
        if name not in shapes:
            raise ValueError(f"weight sync: the engine's model has no parameter {name}")
        if tensor.shape != shapes[name]:
            both = f"{tuple(tensor.shape)} sent, {tuple(shapes[name])} here"
            raise ValueError(f"weight sync: {name} has another shape: {both}")
    missing = sorted(shapes.keys() - {name for name, _ in tensors})
    if missing:
        raise ValueError(f"weight sync: {len(missing)} parameters were not sent, among them {missing[0]}")
