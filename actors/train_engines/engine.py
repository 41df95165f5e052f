"""The contract of training engines, the one place that chooses one, and what they share."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from socket import socket
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from rlflow.actors.train_engines import sharded_state
from rlflow.actors.train_engines.sharded_state import Shard
from rlflow.actors.vision import part_finder
from rlflow.recipe import TrainerBlock


class Engine(Protocol):
    """Owns the parameters and the optimizer of one rank. Every engine gives the same numbers on any number of ranks.

    It takes any module that has a transformers model as ``.model``, and may shard its parameters in place: the module
    is called as before, by all ranks together, and as often on each. All methods are collective.
    """

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``, a scalar: this rank's share of a sum over all ranks.

        Called any number of times before a step, as often on every rank; it must depend on every parameter.
        """
        ...

    def step(self, learning_rate: float) -> float | None:
        """Clips the gradient, once, and steps; the gradient starts again from nothing.

        Returns:
            The gradient's global norm before clipping, or None on all ranks when it was not finite: then no parameter
            and no moment changed.
        """
        ...

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of ``.model`` whole, by its name there; tied ones once. All ranks must drain it.

        Args:
            trained_only: Leave out what is frozen.
        """
        ...

    def save_state(self, directory: Path) -> None:
        """Writes this rank's shard of parameters and moments, and its random state."""
        ...

    def load_state(self, directory: Path) -> None:
        """Reads what any number of ranks of any engine wrote.

        Raises:
            ValueError: Names or shapes do not match this model and optimizer.
        """
        ...


def make_engine(
    module: nn.Module, trainer: TrainerBlock, *, rank: int, world_size: int, shares: Mapping[str, float] | None = None
) -> Engine:
    """The engine that the recipe names.

    Args:
        shares: Parameter, by its name in the module's model -> its learning rate over ``step``'s; 1 of all others.

    Raises:
        ValueError: What it needs is not installed.
    """
    if trainer.engine == "deepspeed":
        from rlflow.actors.train_engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(module, trainer, rank=rank, world_size=world_size, shares=shares)
    from rlflow.actors.train_engines.fsdp_engine import FsdpEngine

    return FsdpEngine(module, trainer, rank=rank, world_size=world_size, shares=shares)


def init_process_group(
    rank: int, world_size: int, address: str, timeout_s: float, listening: socket | None = None
) -> None:
    """Joins the other ranks.

    Args:
        rank: This process's.
        world_size: Number of ranks.
        address: ``host:port`` of rank 0.
        timeout_s: Of every operation of theirs.
        listening: What rank 0 listens on, which is the store's from now on; without it, its port is taken only here.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    descriptor = None if listening is None else listening.detach()
    Store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    store = Store(host, int(port), world_size, rank == 0, timeout, master_listen_fd=descriptor)
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    # Threads of a group that is there until the interpreter has ended abort the process now and then.
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def ensure_process_group(rank: int, world_size: int) -> None:
    """A rank that trains alone gets a group of its own, for engines that cannot do without."""
    if not dist.is_initialized():
        assert (rank, world_size) == (0, 1), "several ranks join by init_process_group first"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(), store=store, rank=0, world_size=1)


def _backend() -> str:
    # Offloaded weights and gradients are summed where they are: on the host.
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated layers: of all lists of modules, but those of a vision tower, the one with most parameters.

    Raises:
        ValueError: There is none.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    part_of = part_finder(inner) if isinstance(inner, PreTrainedModel) else lambda name: "language"
    lists = [
        module
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and part_of(name) == "language"
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers to shard; set trainer.workers: 1")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def save_with_random_state(directory: Path, rank: int, world_size: int, shards: dict[str, Shard]) -> None:
    """Writes this rank's file."""
    states = {"rng/cpu": torch.get_rng_state()}
    # Asking for it would make a trainer on CPUs take memory of a GPU.
    if torch.cuda.is_initialized():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    random = {name: sharded_state.shard_of(state) for name, state in states.items()}
    sharded_state.save(directory, rank, world_size, {**shards, **random})


def load_with_random_state(directory: Path, rank: int, shards: dict[str, Shard]) -> None:
    """Fills the shards, and takes up this rank's random state where as many ranks wrote one."""
    sharded_state.load(directory, shards)
    state = sharded_state.read_own(directory, rank, "rng/cpu")
    if state is not None:
        torch.set_rng_state(state)
    state = sharded_state.read_own(directory, rank, "rng/cuda") if torch.cuda.is_initialized() else None
    if state is not None:
        torch.cuda.set_rng_state(state)
