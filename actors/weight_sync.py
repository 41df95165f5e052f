"""Weights from trainer to engines, whole tensors under their names in a checkpoint.

    trainer: full_weights --pack_weights--> WeightSnapshot --driver--> worker: receive --tensors_of--> load_weights
                              |    put                           get     |
                              +------------> WeightChannel --------------+

The snapshot is a table of what is where; the weights themselves take a channel, which the place decides:

    RayObjects    between processes: a chunk goes from the trainer's own memory into the object store of its host, once.
                  All workers of the host read it there without a copy; another host is sent it once.
    SameProcess   between threads: a copy, since a trainer changes its weights in place

With `rollout.at_update.transport: ipc | collective` a version goes past the store, in the trainer's own call
(actors/weight_stream.py): its snapshot is then empty. The first version, and all that fails, take a channel.

Of a sharded trainer, or one on a GPU, no more than a chunk of whole tensors is held beside the store. bfloat16, which
numpy lacks, needs no special case: tensors travel as bytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayError

CHUNK_BYTES = 1 << 28
"""Tensors are sent on when they are as many bytes together, or it is the last."""
_FETCH_TIMEOUT_S = 600.0
_PROBE_BYTES = 1024


class WeightChannel(Protocol):
    """How arrays get from the process that calls `put` to those that call `get`."""

    name: str

    def put(self, arrays: Sequence[np.ndarray]) -> Any:
        """Sends arrays of bytes on. They may be written over as soon as this returns.

        Returns:
            A handle: what `get` takes, in any process that it reaches.
        """
        ...

    def get(self, handle: Any) -> list[np.ndarray]:
        """The arrays, which may be read-only, in their order.

        Raises:
            ConnectionError: They are gone, or do not come.
        """
        ...


class RayObjects:
    """Ray's object store. A chunk ends with the last snapshot that names it."""

    name = "ray"

    def put(self, arrays: Sequence[np.ndarray]) -> ray.ObjectRef:
        return ray.put(list(arrays))

    def get(self, handle: ray.ObjectRef) -> list[np.ndarray]:
        try:
            return ray.get(handle, timeout=_FETCH_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            raise ConnectionError(f"a chunk of the weights is not to be had: {error}") from error


class SameProcess:
    """For a trainer and engines in one process."""

    name = "process"

    def put(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        copies = [array.copy() for array in arrays]
        for copy in copies:
            # As in Ray's store: engines copy from them and write to none.
            copy.flags.writeable = False
        return copies

    def get(self, handle: list[np.ndarray]) -> list[np.ndarray]:
        return handle


CHANNELS: dict[str, WeightChannel] = {channel.name: channel for channel in (RayObjects(), SameProcess())}


def channel_here() -> WeightChannel:
    """The channel from this process to the rollout workers."""
    return CHANNELS["ray" if ray.is_initialized() else "process"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where one of the trainer's ranks takes rollout workers in, to which it then sends weights past the channels."""

    transport: str
    """ipc or collective."""
    address: tuple[str, int]
    token: str
    """Who says it has been told of this meeting by the trainer."""
    device: str
    """The rank's, as `weight_carriers.device_name` has it."""


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """The policy's weights at one version."""

    version: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """(name in a checkpoint, torch dtype, shape), in the order in which they were sent. Tied weights appear once."""
    channel: str = "process"
    """One of CHANNELS."""
    handles: tuple[Any, ...] = ()
    """Of the chunks. The first begins with a probe, from whose bytes a worker sees whether the channel is sound."""
    is_streamed: bool = False
    """The workers that were taken in have it already, and there is nothing here for others."""
    meetings: tuple[Meeting, ...] = ()
    """Where workers may join for the versions to come."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(_num_bytes(dtype, shape) for _, dtype, shape in self.tensors)


def pack_weights(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    channel: WeightChannel | None = None,
    meetings: tuple[Meeting, ...] = (),
) -> WeightSnapshot:
    """Sends tensors, each cast to nothing: what arrives is what was trained.

    Args:
        named: Drained in order; a tensor is let go as soon as its chunk is sent.
        channel: The one from this process, when absent.
        meetings: See `WeightSnapshot`.
    """
    channel = channel or channel_here()
    table, handles = [], []
    chunk, size = [_probe(version)], 0
    for name, tensor in named:
        table.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        chunk.append(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
        size += chunk[-1].nbytes
        if size >= CHUNK_BYTES:
            handles.append(channel.put(chunk))
            chunk, size = [], 0
    if chunk:
        handles.append(channel.put(chunk))
    return WeightSnapshot(version, tuple(table), channel.name, tuple(handles), meetings=meetings)


def receive(snapshot: WeightSnapshot) -> list[np.ndarray]:
    """Gets all chunks of a snapshot here, where they can be read at memory speed. Returns the bytes of each tensor.

    Raises:
        ConnectionError: They do not come.
        ValueError: They are not what was sent.
    """
    channel = CHANNELS[snapshot.channel]
    arrays = [array for handle in snapshot.handles for array in channel.get(handle)]
    if not snapshot.handles:
        return arrays
    probe, *arrays = arrays
    sizes = [_num_bytes(dtype, shape) for _, dtype, shape in snapshot.tensors]
    if not np.array_equal(probe, _probe(snapshot.version)) or [array.nbytes for array in arrays] != sizes:
        raise ValueError(
            f"what came through the channel {snapshot.channel!r} are not the weights of policy version "
            f"{snapshot.version} that were sent: its probe or a tensor's size differs"
        )
    return arrays


def tensors_of(snapshot: WeightSnapshot, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of what was received: views, which may be read-only. Copy from them, never write."""
    for (name, dtype, shape), array in zip(snapshot.tensors, arrays, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(array)
        yield name, flat.view(getattr(torch, dtype)).view(shape)


def unpack_weights(snapshot: WeightSnapshot) -> Iterator[tuple[str, torch.Tensor]]:
    """Receives a snapshot and returns its names and tensors, as `tensors_of` does."""
    return tensors_of(snapshot, receive(snapshot))


def _probe(version: int) -> np.ndarray:
    return np.random.default_rng(version).integers(0, 256, _PROBE_BYTES, dtype=np.uint8)


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize
