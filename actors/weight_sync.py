"""Weights from trainer to engines: one flat buffer of bytes and a table of what lies where.

The buffer is a numpy array, so Ray's object store moves it at memory speed and every worker on a host reads the same
shared memory without a copy; between hosts it is sent once a host. bfloat16, which numpy lacks, needs no special case.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """The policy's weights at one version."""

    version: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name in a checkpoint, torch dtype, shape), in the order of the buffer. Tied weights appear once."""
    buffer: np.ndarray
    """uint8 [bytes of all tensors]."""


def pack_weights(named: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightSnapshot:
    """Copies tensors end to end, each cast to nothing: what arrives is what was trained."""
    tensors, buffer = [], bytearray()
    for name, tensor in named:
        tensors.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        # Taken at once: a sharded trainer gathers tensors one by one, and whole ones need not all be held.
        buffer += tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    return WeightSnapshot(version, tuple(tensors), np.frombuffer(buffer, dtype=np.uint8))


def unpack_weights(snapshot: WeightSnapshot) -> Iterator[tuple[str, torch.Tensor]]:
    """Views into the buffer, which may be read-only: copy from them, never write."""
    offset = 0
    for name, dtype_name, shape in snapshot.tensors:
        dtype = getattr(torch, dtype_name)
        num_bytes = math.prod(shape) * dtype.itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(snapshot.buffer[offset : offset + num_bytes])
        yield name, flat.view(dtype).view(shape)
        offset += num_bytes
    assert offset == len(snapshot.buffer)
