"""The scenarios' steps on any engine and number of ranks. Run as a script, it is one rank.

Before the last step one rank's gradient is not finite, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_scenarios import (
    LEARNING_RATES,
    SCENARIOS,
    VOCABULARY,
    Scenario,
    count_tokens,
    loss_of,
    micro_batches,
    new_module,
    trainer_block,
)
from safetensors.torch import load_file, save_file


class Run:
    """One rank of a scenario."""

    def __init__(self, scenario: Scenario, rank: int, world_size: int) -> None:
        from rlflow.actors.train_engines.engine import make_engine

        self.rank, self.world_size = rank, world_size
        self.module = new_module(scenario)
        if world_size > 1:
            self.module.passes.ranks = dist.group.WORLD
        self.engine = make_engine(self.module, trainer_block(scenario, world_size), rank=rank, world_size=world_size)

    def step(self, step: int, spoiled: bool = False) -> tuple[float, float | None]:
        """The step's loss over all ranks and the gradient's norm."""
        batches = micro_batches(step)
        own, num_tokens = batches[self.rank :: self.world_size], count_tokens(batches)
        with torch.no_grad():
            before = [loss_of(self.module, batch, num_tokens) for batch in own]
        total = torch.zeros(())
        for batch, expected in zip(own, before, strict=True):
            loss = loss_of(self.module, batch, num_tokens)
            assert torch.equal(loss, expected)
            total += loss.detach()
            self.engine.backward(loss * float("nan") if spoiled and self.rank == 0 else loss)
        self.look()
        if self.world_size > 1:
            dist.all_reduce(total)
        return float(total), self.engine.step(LEARNING_RATES[step])

    def weights(self) -> dict[str, torch.Tensor]:
        self.look()
        return {name: tensor.detach().clone() for name, tensor in self.engine.full_weights()}

    @torch.no_grad()
    def look(self) -> None:
        """A forward pass without a backward one, as an evaluation has it: it may come before anything else."""
        loss_of(self.module, micro_batches(0)[self.rank], 1)

    def save(self, directory: Path) -> Path:
        self.look()
        directory.mkdir(parents=True, exist_ok=True)
        self.engine.save_state(directory)
        if self.world_size > 1:
            dist.barrier()
        return directory


def train(scenario: Scenario, rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """Three steps, with a spoiled one before the last; the states after the first and the second stay behind."""
    run = Run(scenario, rank, world_size)
    before = [run.step(0)]
    run.save(directory / f"first-of-{world_size}")
    before.append(run.step(1))
    saved = run.save(directory / f"of-{world_size}")
    _, skipped = run.step(2, spoiled=True)
    again = run.save(directory / f"of-{world_size}-again")
    file = f"state-{rank:05d}-of-{world_size:05d}.safetensors"
    one, other = load_file(saved / file), load_file(again / file)
    losses, norms = zip(*before, run.step(2), strict=True)
    weights = run.weights()
    if rank == 0:
        save_file(weights, directory / f"weights-of-{world_size}.safetensors")
    return {
        "losses": losses,
        "norms": norms,
        "skipped": skipped is None,
        "unchanged": one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one),
    }


def resume(scenario: Scenario, rank: int, world_size: int, checkpoint: Path, into: Path) -> dict[str, Any]:
    """The last step from a checkpoint. The weights it starts from are spoiled first, to be sure that they are read."""
    run = Run(scenario, rank, world_size)
    run.step(0)
    run.engine.load_state(checkpoint)
    loss, norm = run.step(2)
    weights = run.weights()
    if rank == 0:
        into.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, into)
    return {"loss": loss, "norm": norm}


def launch(jobs: Sequence[dict[str, Any]], world_size: int, directory: Path, timeout_s: float = 800) -> list[Any]:
    """Runs jobs on so many processes; the answers of rank 0 to each. Every rank must keep its stdout clean."""
    # A rank, which runs this file alone, has no need of it.
    from free_ports import free_address

    address = free_address()
    work = directory / f"jobs-{time.monotonic_ns()}.json"
    work.write_text(json.dumps(jobs))
    root = Path(__file__).resolve().parents[3]
    extensions = directory / "compiled"
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TORCH_EXTENSIONS_DIR": str(extensions)}
    environment = os.environ | settings
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        environment.pop(name, None)
    processes = []
    for rank in range(world_size):
        command = [sys.executable, __file__, str(rank), str(world_size), address, str(work)]
        with Path(f"{work}.{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            )
    try:
        deadline = time.monotonic() + timeout_s
        printed = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(Path(f"{work}.{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert [process.returncode for process in processes] == [0] * world_size, logs
    assert printed == [""] * world_size
    assert not extensions.exists(), "something was compiled: a user without a compiler would fail"
    return json.loads(Path(f"{work}.answers").read_text())


def main(rank: int, world_size: int, address: str, work: Path) -> None:
    from rlflow.actors.train_engines import token_model
    from rlflow.actors.train_engines.engine import init_process_group

    torch.set_num_threads(1)
    # Ranks then score their tokens in different numbers of chunks.
    token_model._CHUNK_BYTES = 4 * 4 * VOCABULARY
    if world_size > 1:
        init_process_group(rank, world_size, address, timeout_s=120)
    answers = []
    for job in json.loads(work.read_text()):
        started = time.monotonic()
        scenario = SCENARIOS[job["scenario"]]
        if job["kind"] == "train":
            directory = Path(job["directory"])
            directory.mkdir(parents=True, exist_ok=True)
            answers.append(train(scenario, rank, world_size, directory))
        else:
            answers.append(resume(scenario, rank, world_size, Path(job["checkpoint"]), Path(job["into"])))
        print(f"{job}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if rank == 0:
        Path(f"{work}.answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
