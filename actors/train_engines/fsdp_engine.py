"""The default training engine: FSDP2 (`fully_shard`) over 1..N ranks, clipping, sharded state in safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlflow.actors.checkpoint_names import kept_buffers
from rlflow.actors.quantized_bases import in_few_bits
from rlflow.actors.train_engines.engine import (
    decoder_layers,
    ensure_process_group,
    load_with_random_state,
    save_with_random_state,
)
from rlflow.actors.train_engines.optimizers import Moments, Shares, make_optimizer, trainable
from rlflow.actors.train_engines.sharded_state import Shard, shard_of
from rlflow.recipe import FsdpBlock, TrainerBlock


class FsdpEngine:
    """See Engine. On one rank without special wishes nothing is wrapped: plain tensors, and no process group.

    A model in bfloat16 is trained as one in float32 that computes in bfloat16, and is handed out in bfloat16: an update
    of 1e-6 is lost in the eight bits of a bfloat16 weight. ZeRO does the same.
    """

    def __init__(
        self, module: nn.Module, trainer: TrainerBlock, *, rank: int, world_size: int, shares: Shares | None = None
    ) -> None:
        self.module = module
        self.rank, self.world_size = rank, world_size
        self.max_grad_norm = trainer.max_grad_norm
        self.is_half = any(parameter.dtype == torch.bfloat16 for _, parameter in trainable(module))
        if self.is_half:
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
        mixed_precision = self.is_half or trainer.fsdp.mixed_precision
        if world_size > 1 or trainer.fsdp.offload or mixed_precision:
            ensure_process_group(rank, world_size)
            _shard(module, trainer.fsdp, world_size, mixed_precision)
        self.optimizer = make_optimizer(module, trainer.optimizer, shares)

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages over ranks; global denominators are already in the loss, so the sum is wanted.
        (loss * self.world_size).backward()

    def step(self, learning_rate: float) -> float | None:
        self._reshard()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(grad_norm)
        if finite:
            self.optimizer.step(learning_rate)
        self.module.zero_grad(set_to_none=True)
        return grad_norm if finite else None

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        self._reshard()
        model = self.module.get_submodule("model")
        for name, parameter in model.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            tensor = parameter.detach().bfloat16() if self.is_half else parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not trained_only:
            yield from kept_buffers(model)

    def save_state(self, directory: Path) -> None:
        moments = self._moments()
        save_with_random_state(directory, self.rank, self.world_size, self._shards(moments))
        self._put(moments)

    def load_state(self, directory: Path) -> None:
        moments = self._moments()
        load_with_random_state(directory, self.rank, self._shards(moments))
        self._put(moments)

    def _reshard(self) -> None:
        """A forward pass without a backward one leaves whole weights in the place of the trained parameters."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _moments(self) -> dict[str, Moments]:
        self._reshard()
        return {name: self.optimizer.moments(parameter) for name, parameter in trainable(self.module)}

    def _shards(self, moments: dict[str, Moments]) -> dict[str, Shard]:
        shards = {}
        for name, parameter in trainable(self.module):
            shards[f"model/{name}"] = shard_of(parameter)
            for key, values in moments[name].items():
                shards[f"{key}/{name}"] = shard_of(parameter, values)
        return shards

    def _put(self, moments: dict[str, Moments]) -> None:
        for name, parameter in trainable(self.module):
            self.optimizer.put(parameter, moments[name])


def _shard(module: nn.Module, block: FsdpBlock, world_size: int, mixed_precision: bool) -> None:
    """Wraps every layer and the rest.

    Raises:
        ValueError: fsdp.replicas does not divide the number of ranks.
    """
    if world_size % block.replicas:
        raise ValueError(f"trainer.fsdp.replicas: {block.replicas} does not divide the {world_size} ranks")
    device = next(module.parameters()).device.type
    shards = world_size // block.replicas
    mesh = (
        init_device_mesh(device, (world_size,))
        if block.replicas == 1
        else init_device_mesh(device, (block.replicas, shards), mesh_dim_names=("replicate", "shard"))
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mesh": mesh,
        "mp_policy": policy if mixed_precision else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda") if block.offload else OffloadPolicy(),
    }
    # Weights in few bits, with scales beside them, are whole on every rank.
    options["ignored_params"] = {parameter for parameter in module.parameters() if in_few_bits(parameter)}
    for layer in decoder_layers(module):
        fully_shard(layer, reshard_after_forward=block.reshard_after_forward, **options)
    fully_shard(module, **options)
