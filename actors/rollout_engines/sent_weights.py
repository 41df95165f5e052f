"""Weights as a trainer sends them, checked before an engine takes any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


class Chunks:
    """Weights that come in pieces: the tensors of a chunk are there until the next is asked for, once."""

    def __init__(self, chunks: Iterator[list[tuple[str, torch.Tensor]]]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self.chunks:
            yield from chunk


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The chunks of weights, each checked before it is handed out; weights that are here are one chunk.

    Raises:
        ValueError: A name is not in ``shapes``, has another shape, or was left out.
    """
    if not isinstance(weights, Chunks):
        tensors = list(weights)
        check_weights(tensors, shapes)
        yield tensors
        return
    sent: set[str] = set()
    for chunk in weights.chunks:
        _check_each(chunk, shapes)
        sent.update(name for name, _ in chunk)
        yield chunk
    _check_all(sent, shapes)


def check_weights(tensors: list[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError for a name that is not in ``shapes``, for another shape, and for a weight that was left out."""
    _check_each(tensors, shapes)
    _check_all({name for name, _ in tensors}, shapes)


def _check_each(tensors: list[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]) -> None:
    for name, tensor in tensors:
        if name not in shapes:
            raise ValueError(f"weight sync: the engine's model has no parameter {name}")
        if tensor.shape != shapes[name]:
            both = f"{tuple(tensor.shape)} sent, {tuple(shapes[name])} here"
            raise ValueError(f"weight sync: {name} has another shape: {both}")


def _check_all(sent: set[str], shapes: dict[str, torch.Size]) -> None:
    missing = sorted(shapes.keys() - sent)
    if missing:
        raise ValueError(f"weight sync: {len(missing)} parameters were not sent, among them {missing[0]}")
