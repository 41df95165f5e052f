"""One of the ranks that train adapters, one after the other, and leave each where they are told.

Run as a script, with a rank, how many there are, and a JSON file that lists of each adapter its block in a recipe, the
base, the address at which ranks meet, and a file to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from saving_ranks import micro_batch

from rlflow.actors import adapters
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators


def train(rank: int, world_size: int, adapter: dict[str, Any], base: str, address: str | None, output: str) -> None:
    """Two updates of two sequences each, dealt to the ranks."""
    block = ModelBlock(path=base, adapter=AdapterBlock(**adapter))
    settings = TrainerBlock(workers=world_size)
    trainer = PolicyTrainer(block, settings, rank=rank, world_size=world_size, num_threads=1, seed=0)
    # Four bits work on a CPU too, slowly.
    with mock.patch.object(adapters, "check_quantized"):
        trainer.setup(address)
    norms = []
    for step in range(2):
        batches = [micro_batch(2 * step + number) for number in range(2)][rank::world_size]
        trainer.forward_backward(batches, algorithm_of("sft"), Denominators(22, 2, 2))
        norms.append(trainer.optim_step(1e-3).grad_norm)
    trained = {name: tensor.cpu() for name, tensor in trainer.engine.full_weights(trained_only=True)}
    reference = trainer.reference_logprobs([micro_batch(9)])
    if rank == 0:
        torch.save(trained | {"norms": torch.tensor(norms), "reference": torch.from_numpy(reference)}, output)


def main(rank: int, world_size: int, asked: Path) -> None:
    for adapter, base, address, output in json.loads(asked.read_text()):
        train(rank, world_size, adapter, base, address, output)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
