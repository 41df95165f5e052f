"""DeepSpeed's ZeRO stages 1, 2 and 3 with torch's AdamW, on GPUs or the CPU, under the contract of engines.

DeepSpeed compiles C++ for its own optimizers and its shared-memory collectives when they are first used, asks MPI for
ranks when no launcher set its variables, and logs to stdout. None of it happens here: the process group is ours, the
optimizer torch's, and its log goes to stderr.

Checkpoints are ours as well: DeepSpeed's hold pickles. ZeRO keeps float32 values and moments of all parameters in flat
buffers, of which each rank owns a piece; where each parameter lies in it is written beside it (see sharded_state).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from rlflow.actors.checkpoint_names import kept_buffers
from rlflow.actors.train_engines.engine import ensure_process_group, load_with_random_state, save_with_random_state
from rlflow.actors.train_engines.optimizers import (
    Shares,
    decay_groups,
    fresh_moments,
    set_learning_rate,
    trainable,
    trained_rates,
)
from rlflow.actors.train_engines.sharded_state import Shard, shard_of
from rlflow.recipe import OptimizerBlock, TrainerBlock


class _Place(NamedTuple):
    """Where a rank's elements of a parameter lie."""

    flat: torch.Tensor
    offset: int
    """Of the first in the flat buffer."""
    start: int
    """Of the first in the flattened parameter."""
    length: int
    shape: tuple[int, ...]
    """Of the whole parameter."""

    def shard(self, values: torch.Tensor) -> Shard:
        """Of ``flat`` or of its moments."""
        return Shard(values[self.offset : self.offset + self.length], self.start, self.shape)


class DeepSpeedEngine:
    """See Engine."""

    def __init__(
        self, module: nn.Module, trainer: TrainerBlock, *, rank: int, world_size: int, shares: Shares | None = None
    ) -> None:
        self.module = module
        self.rank, self.world_size = rank, world_size
        self.stage = trainer.deepspeed.stage
        deepspeed = _import_deepspeed(next(module.parameters()).device)
        ensure_process_group(rank, world_size)
        self._gathered = deepspeed.zero.GatheredParameters
        block = trainer.optimizer
        assert isinstance(block, OptimizerBlock), "the recipe refuses other optimizers of this engine"
        groups = decay_groups(trained_rates(module, shares), block.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=block.betas, eps=block.eps, fused=True)
        with contextlib.redirect_stdout(sys.stderr):
            self.deepspeed, self.zero, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=_config(module, trainer), dist_init_required=False
            )
        self._make_moments()

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed's own forward does this; the module is called without it.
        self.zero.clear_backward_seen_flag()
        self.zero.set_gradient_accumulation_boundary(False)
        # ZeRO averages over ranks; global denominators are already in the loss, so the sum is wanted.
        self.deepspeed.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float | None:
        set_learning_rate(self.zero.param_groups, learning_rate)
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()) if self.deepspeed.was_step_applied() else None

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.module.get_submodule("model")
        for name, parameter in model.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            if self.stage < 3:
                yield name, parameter.detach()
                continue
            with self._gathered([parameter]):
                whole = parameter.detach().clone()
            yield name, whole
        if not trained_only:
            yield from kept_buffers(model)

    def save_state(self, directory: Path) -> None:
        save_with_random_state(directory, self.rank, self.world_size, self._shards())

    def load_state(self, directory: Path) -> None:
        load_with_random_state(directory, self.rank, self._shards())
        self._publish()

    def _make_moments(self) -> None:
        """At once, instead of at the first step, so that a checkpoint can always be written and read."""
        for flat in self._flats():
            self.zero.optimizer.state[flat] = fresh_moments(flat)
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[torch.Tensor]:
        """This rank's piece of every flat buffer of float32 values."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.zero.optimizer.param_groups]

    def _shards(self) -> dict[str, Shard]:
        """Of the parameters that this rank owns some of. Values and moments are views of the flat buffers."""
        shards = {}
        for name, parameter in trainable(self.module):
            place = self._place_in_stage_3(parameter) if self.stage == 3 else self._place(parameter)
            if place is None:
                continue
            shards[f"model/{name}"] = place.shard(place.flat.detach())
            for key, values in self.zero.optimizer.state[place.flat].items():
                shards[f"{key}/{name}"] = place.shard(values) if values.ndim else shard_of(values)
        return shards

    def _place(self, parameter: Any) -> _Place | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        inside, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self._flats()[mapping.param_group_index]
        return _Place(flat, inside.start, own.start, own.numel, tuple(parameter.shape))

    def _place_in_stage_3(self, parameter: Any) -> _Place | None:
        group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.rank * padded
        length = min(padded, parameter.ds_numel - start)
        if length <= 0:
            return None
        return _Place(self._flats()[group], offset, start, length, tuple(parameter.ds_shape))

    def _publish(self) -> None:
        """Parameters take up the float32 values, on all ranks."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self._flats())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def _import_deepspeed(device: torch.device) -> ModuleType:
    """
    Raises:
        ValueError: It is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed makes the device of this number current.
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if device.type == "cuda" else 0)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        # Its logger keeps the stdout it finds now.
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ValueError(
            "trainer.engine: deepspeed needs DeepSpeed: pip install deepspeed, or use engine: fsdp"
        ) from error
    # Asked which operators it could compile, it runs compilers to find out; we want none.
    deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    return deepspeed


def _config(module: nn.Module, trainer: TrainerBlock) -> dict[str, Any]:
    """What DeepSpeed's JSON file would hold. https://www.deepspeed.ai/docs/config-json"""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    model: Any = module.get_submodule("model")
    zero: dict[str, Any] = {
        "stage": trainer.deepspeed.stage,
        # An even number of elements, of which no more than there are; buffers of this size are allocated.
        "reduce_bucket_size": min(parameters, 100_000_000) // 2 * 2,
        "allgather_bucket_size": min(parameters, 100_000_000) // 2 * 2,
        # Smaller parameters stay whole on every rank: norms and biases, as transformers' own integration has it.
        "stage3_param_persistence_threshold": 10 * model.config.get_text_config().hidden_size,
    }
    if trainer.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if trainer.deepspeed.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    # Of what is trained: told bfloat16, DeepSpeed would cast an adapter in float32 too.
    if next(parameter for _, parameter in trainable(module)).dtype == torch.bfloat16:
        # Without immediate_grad_update, stage 1 adds a micro-batch's gradient again for each one after it.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
