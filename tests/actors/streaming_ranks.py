"""One of two ranks that train a sharded model and send its weights past the object store.

Run as a script, with a rank, the address at which ranks meet, a model and a directory, in which rank 0 leaves for each
transport where workers may join, the versions as snapshots would have brought them, and what was streamed.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from rlflow.actors import weight_stream
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.weight_sync import unpack_weights
from rlflow.recipe import ModelBlock, TrainerBlock

VERSIONS = 4


def main(rank: int, address: str, model: str, directory: Path) -> None:
    weight_stream.CHUNK_BYTES["cpu"] = 8192
    block, settings = ModelBlock(path=model, dtype="bfloat16"), TrainerBlock(workers=2)
    trainer = PolicyTrainer(block, settings, rank=rank, world_size=2, num_threads=1, seed=0)
    trainer.setup(address)
    for transport in ("ipc", "collective"):
        trainer.transport, trainer._stream = transport, None
        send(trainer, directory / transport)
    dist.destroy_process_group()


def send(trainer: PolicyTrainer, directory: Path) -> None:
    first = trainer.weights(0)
    if first is not None:
        directory.mkdir()
        (directory / "meetings.tmp").write_text(json.dumps([asdict(meeting) for meeting in first.meetings]))
        (directory / "meetings.tmp").rename(directory / "meetings.json")
    while not (directory / "joined").exists():
        time.sleep(0.02)
    streamed = []
    for version in range(1, VERSIONS + 1):
        with torch.no_grad():
            for parameter in trainer.module.parameters():
                parameter.mul_(1.01)
        sent, whole = trainer.weights(version), trainer.weights(version, whole=True)
        if sent is not None and whole is not None:
            streamed.append(sent.is_streamed)
            torch.save(dict(unpack_weights(whole)), directory / f"{version}.pt")
    if trainer.rank == 0:
        (directory / "streamed.json").write_text(json.dumps(streamed))
    assert trainer._stream is not None
    trainer._stream.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4]))
