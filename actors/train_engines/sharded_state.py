"""Sharded state as safetensors: a file a rank, readable by any number of ranks, and no pickle anywhere.

torch.distributed.checkpoint would do this but for its pickled metadata file, which a checkpoint must not hold. FSDP2
shards every tensor on dimension 0, so a shard is a range of rows; its place is written beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


def save(directory: Path, rank: int, world_size: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes ``state-<rank>-of-<world_size>.safetensors``. DTensors must be sharded on dimension 0 or replicated."""
    local = {name: _local(tensor)[0].contiguous().cpu() for name, tensor in tensors.items()}
    rows = {name: [_local(tensor)[1], list(tensor.shape)] for name, tensor in tensors.items()}
    path = directory / f"state-{rank:05d}-of-{world_size:05d}.safetensors"
    save_file(local, path, metadata={"rows": json.dumps(rows)})


def load(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills ``tensors`` in place from the shards in ``directory``, however many ranks wrote them.

    Raises:
        ValueError: A tensor is missing or has another shape: the checkpoint is of another model.
    """
    files = [safe_open(path, framework="pt") for path in _files(directory)]
    places = [json.loads(file.metadata()["rows"]) for file in files]
    for name, tensor in tensors.items():
        local, start = _local(tensor)
        found = [(file, place[name]) for file, place in zip(files, places, strict=True) if name in place]
        if not found:
            raise ValueError(f"{directory}: no tensor {name}; the checkpoint is of another model")
        shape = found[0][1][1]
        if shape != list(tensor.shape):
            raise ValueError(f"{directory}: {name} has shape {shape}, the model wants {list(tensor.shape)}")
        if local.ndim == 0:
            local.copy_(found[0][0].get_tensor(name))
            continue
        filled = 0
        for file, (first, _) in found:
            rows = file.get_slice(name)
            begin, end = max(start, first), min(start + len(local), first + rows.get_shape()[0])
            if begin < end and filled < len(local):
                local[begin - start : end - start].copy_(rows[begin - first : end - first])
                filled += end - begin
        if filled != len(local):
            raise ValueError(f"{directory}: {name} has {filled} of the {len(local)} rows wanted")


def read_own(directory: Path, rank: int, name: str) -> torch.Tensor | None:
    """A tensor of this rank's own file; None when fewer ranks wrote the checkpoint."""
    files = _files(directory)
    if rank >= len(files):
        return None
    with safe_open(files[rank], framework="pt") as file:
        return file.get_tensor(name)


def _files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("state-*-of-*.safetensors"))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError(f"{directory}: incomplete checkpoint, {len(files)} state files")
    return files


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows and the number of the first one."""
    if not isinstance(tensor, DTensor) or not any(placement.is_shard() for placement in tensor.placements):
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]
