"""Sharded state as safetensors: a file a rank, readable by any number of ranks of any engine, and no pickle anywhere.

A shard is a run of elements of a tensor, flattened: FSDP2's rows and ZeRO's pieces of flat buffers alike. Its place is
written beside it. torch.distributed.checkpoint would do this but for its pickled metadata file, which a checkpoint must
not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rlflow.checkpoint import naming_the_disk

_REMEDY = ": set the recipe's model and optimizer back, or choose another run.output_dir"


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a tensor."""

    values: torch.Tensor
    """[n], a view of what the rank holds."""
    start: int
    """Of ``values[0]`` in the flattened whole."""
    shape: tuple[int, ...]
    """Of the whole."""
    is_copy: bool = False
    """Another rank holds the same elements, and writes them."""


def shard_of(tensor: torch.Tensor, values: torch.Tensor | None = None) -> Shard:
    """The part of ``tensor`` that this rank holds, or other values of the same elements (say, their moments).

    DTensors must be sharded on dimension 0 or replicated, which is what FSDP2 does.
    """
    values = local_of(tensor) if values is None else values
    if values.ndim == 0:
        return Shard(values.view(1), 0, ())
    if not isinstance(tensor, DTensor):
        return Shard(values.view(-1), 0, tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    start = offset[0] * (tensor.numel() // tensor.shape[0])
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    is_copy = any(
        index and placement.is_replicate() for index, placement in zip(coordinate, tensor.placements, strict=True)
    )
    return Shard(values.view(-1), start, tuple(tensor.shape), is_copy)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it, sharing memory, without a gradient."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def save(directory: Path, rank: int, world_size: int, shards: Mapping[str, Shard]) -> None:
    """Writes ``state-<rank>-of-<world_size>.safetensors``.

    Raises:
        DiskError: It cannot be written.
    """
    own = {name: shard for name, shard in shards.items() if not shard.is_copy}
    places = {name: [shard.start, list(shard.shape)] for name, shard in own.items()}
    path = directory / f"state-{rank:05d}-of-{world_size:05d}.safetensors"
    # On the host already, values may be views of one buffer, which safetensors refuses to write.
    values = {name: shard.values.to("cpu", copy=True) for name, shard in own.items()}
    with naming_the_disk(path, sum(value.nbytes for value in values.values())):
        save_file(values, path, metadata={"places": json.dumps(places)})


def load(directory: Path, shards: Mapping[str, Shard]) -> None:
    """Fills ``shards`` in place from the files in ``directory``, however many ranks wrote them.

    Raises:
        ValueError: A tensor is missing or has another shape: the checkpoint is of another model or optimizer.
    """
    files = [safe_open(path, framework="pt") for path in _files(directory)]
    places = [json.loads((file.metadata() or {}).get("places", "null")) for file in files]
    if None in places:
        raise ValueError(f"{directory}: its state files are not of this version of rlflow: start the run anew")
    for name, shard in shards.items():
        found = [
            (file, place[name][0], place[name][1]) for file, place in zip(files, places, strict=True) if name in place
        ]
        if not found:
            raise ValueError(f"{directory}: no tensor {name}; the checkpoint is of another model or optimizer{_REMEDY}")
        shape = tuple(found[0][2])
        if shape != shard.shape:
            raise ValueError(
                f"{directory}: {name} has shape {list(shape)}, the model wants {list(shard.shape)}{_REMEDY}"
            )
        filled, wanted, end = 0, len(shard.values), shard.start + len(shard.values)
        for file, first, _ in found:
            piece = file.get_slice(name)
            low, high = max(shard.start, first), min(end, first + piece.get_shape()[0])
            if low < high and filled < wanted:
                shard.values[low - shard.start : high - shard.start].copy_(piece[low - first : high - first])
                filled += high - low
        if filled != wanted:
            raise ValueError(f"{directory}: {name} has {filled} of the {wanted} elements wanted")


def read_own(directory: Path, rank: int, name: str) -> torch.Tensor | None:
    """A tensor of this rank's own file; None when fewer ranks wrote the checkpoint, or they had none of that name."""
    files = _files(directory)
    if rank >= len(files):
        return None
    with safe_open(files[rank], framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def _files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("state-*-of-*.safetensors"))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError(f"{directory}: incomplete checkpoint, {len(files)} state files")
    return files
