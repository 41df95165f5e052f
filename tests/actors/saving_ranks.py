"""One rank of two that trains, saves and exports a model under every engine.

Run as a script, with a rank, an address, the model to start from and where to write.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.trainer import Trainer
from rlflow.recipe import ModelBlock, TrainerBlock
from rlflow.types import MicroBatch

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("float32", {"engine": "fsdp"}),
    "fsdp_half": ("bfloat16", {"engine": "fsdp"}),
    "zero_1": ("float32", {"engine": "deepspeed", "deepspeed": {"stage": 1}}),
    "zero_2_half": ("bfloat16", {"engine": "deepspeed", "deepspeed": {"stage": 2}}),
    "zero_3_half": ("bfloat16", {"engine": "deepspeed", "deepspeed": {"stage": 3}}),
}
"""The model's dtype and the trainer block."""
LENGTH = 12


def micro_batch(seed: int) -> MicroBatch:
    """One sequence."""
    mask = np.arange(LENGTH) > 0
    return MicroBatch(
        token_ids=np.random.default_rng(seed).integers(2, 60, LENGTH).astype(np.int32),
        position_ids=np.arange(LENGTH, dtype=np.int32),
        cu_seqlens=np.array([0, LENGTH], dtype=np.int32),
        loss_mask=mask,
        loss_weights=mask.astype(np.float32),
        sample_indices=np.zeros(1, dtype=np.int32),
        labels=np.zeros(1, dtype=np.float32),
    )


def train(trainer: Trainer, *, is_classifier: bool = False) -> None:
    """Two steps: of an adapter the first changes B alone."""
    for step in range(2):
        batch = micro_batch(2 * step + trainer.rank)
        module = trainer.module
        values = module(batch, trainer.device, "scores") if is_classifier else module.of_batch(batch, trainer.device)[0]
        trainer.engine.backward(-values.sum())
        assert trainer.optim_step(1e-2).grad_norm > 0


def save_and_export(trainer: Trainer, directory: Path) -> None:
    """Leaves ``saved`` and ``final`` in a directory."""
    for name in ("saved", "final"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    trainer.save(directory / "saved")
    trainer.export(directory / "final")


def main(rank: int, address: str, start: Path, output: Path) -> None:
    for name, (dtype, block) in ENGINES.items():
        trainer = PolicyTrainer(
            ModelBlock.model_validate({"path": str(start), "dtype": dtype}),
            TrainerBlock.model_validate({"workers": 2, **block}),
            rank=rank,
            world_size=2,
            num_threads=1,
            seed=0,
        )
        # One process group serves them all.
        trainer.setup(None if dist.is_initialized() else address)
        train(trainer)
        save_and_export(trainer, output / name)
        dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
