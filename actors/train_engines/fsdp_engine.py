"""The default training engine: FSDP2 (`fully_shard`) over 1..N ranks, AdamW, clipping, sharded state in safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from actors.train_engines import sharded_state
from actors.train_engines.token_model import TokenModel
from rlflow.recipe import TrainerBlock


class FsdpEngine:
    """Owns the sharded parameters and the optimizer of one rank.

    On one rank nothing is wrapped: the parameters are plain tensors and no process group exists.
    """

    def __init__(self, module: TokenModel, trainer: TrainerBlock, *, rank: int, world_size: int) -> None:
        self.module = module
        self.rank, self.world_size = rank, world_size
        self.max_grad_norm = trainer.max_grad_norm
        if world_size > 1:
            layers = module.model.get_decoder().layers
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                fully_shard(layer)
            fully_shard(module)
        self.optimizer = torch.optim.AdamW(
            _decay_groups(module, trainer.weight_decay), lr=trainer.learning_rate, betas=trainer.betas, fused=True
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``, this rank's share of a sum over all ranks."""
        # FSDP averages over ranks; global denominators are already in the loss, so the sum is wanted.
        (loss * self.world_size).backward()

    def step(self, learning_rate: float) -> float | None:
        """Clips, steps, clears the gradients.

        Returns:
            The gradient's norm before clipping, or None when it was not finite: then no parameter or moment changed.
        """
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(grad_norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm if finite else None

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, by its Hugging Face name; tied ones once. Collective: all ranks must drain it."""
        for name, parameter in self.module.model.named_parameters():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def save_state(self, directory: Path) -> None:
        """Writes this rank's shard of parameters and moments, and its random state."""
        tensors = dict(self._state())
        tensors["rng/cpu"] = torch.get_rng_state()
        sharded_state.save(directory, self.rank, self.world_size, tensors)

    def load_state(self, directory: Path) -> None:
        """Reads what any number of ranks wrote. Raises ValueError when names or shapes do not match this model."""
        self._materialize_moments()
        sharded_state.load(directory, dict(self._state()))
        random_state = sharded_state.read_own(directory, self.rank, "rng/cpu")
        if random_state is not None:
            torch.set_rng_state(random_state)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.module.model.named_parameters():
            yield f"model/{name}", parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                yield f"{key}/{name}", value

    def _materialize_moments(self) -> None:
        """AdamW makes its moments at the first step: take one that changes nothing, so that there is where to load."""
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def init_process_group(rank: int, world_size: int, address: str, timeout_s: float) -> None:
    """address: ``host:port`` of rank 0."""
    from datetime import timedelta

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices, none on norms and biases."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
