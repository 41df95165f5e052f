"""Ranks that train an adapter on a base of four bits, and leave it where they are told.

Run as a script, with a rank, how many there are, an address, the model to start from and a file to write.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from saving_ranks import micro_batch

from rlflow.actors import adapters
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators


def main(rank: int, world_size: int, address: str | None, start: str, output: Path) -> None:
    """Two updates of two sequences each, dealt to the ranks."""
    block = ModelBlock(path=start, adapter=AdapterBlock(rank=4, quantize="nf4"))
    settings = TrainerBlock(workers=world_size)
    trainer = PolicyTrainer(block, settings, rank=rank, world_size=world_size, num_threads=1, seed=0)
    # On a CPU it works too, slowly.
    with mock.patch.object(adapters, "check_quantized"):
        trainer.setup(address)
    for step in range(2):
        batches = [micro_batch(2 * step + number) for number in range(2)][rank::world_size]
        trainer.forward_backward(batches, algorithm_of("sft"), Denominators(22, 2, 2))
        assert trainer.optim_step(1e-3).grad_norm > 0
    trained = {name: tensor.cpu() for name, tensor in trainer.engine.full_weights(trained_only=True)}
    if rank == 0:
        torch.save(trained, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None, sys.argv[4], Path(sys.argv[5]))
