"""What a trained token costs: the forward and backward pass of GRPO's loss, rlflow's and TRL's, on the same rows.

    python benchmarks/trained_tokens.py models/SmolLM2-135M-Instruct

Two processes take turns, a pass each, back and forth; rlflow's allocates as its trainers do, with jemalloc, TRL's with
glibc. The ratio is the median of the ratios of turns next to each other, of processor time, which other work on the
machine disturbs little; with one thread it is the time that a pass takes on a machine of one's own. Losses must agree.
With --rows 8 --rounds 2, on two cores that others used as well, 1.59 times as many tokens (1.57 to 1.60):

| | tokens/s | tokens a second of processors | loss |
|---|---|---|---|
| TRL | 27 | 69 | -0.230026 |
| rlflow | 55 | 110 | -0.230026 |
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from rlflow.actors.host_memory import allocator_environment
from rlflow.types import Denominators, MicroBatch, Sample

TIMEOUT_S = 600.0
GROUP = 4


@dataclass(frozen=True)
class Rows:
    """What both train: ``prompts`` int [R, P], ``completions`` int [R, C] of which the first ``lengths`` [R] count."""

    prompts: np.ndarray
    completions: np.ndarray
    lengths: np.ndarray
    advantages: np.ndarray
    """float32 [R]."""

    @property
    def num_tokens(self) -> int:
        """Of prompts and completions, without padding."""
        return self.prompts.size + int(self.lengths.sum())


def make_rows(number: int, prompt: int, longest: int) -> Rows:
    """Completions of half the longest length to all of it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(longest // 2, longest + 1, number)
    return Rows(
        rng.integers(5, 1000, (number, prompt)),
        rng.integers(5, 1000, (number, longest)) * (np.arange(longest) < lengths[:, None]),
        lengths,
        rng.normal(size=number).astype(np.float32),
    )


def rlflow_pass(model_dir: str, rows: Rows, threads: int) -> Callable[[], float]:
    """Makes the function that goes through PolicyTrainer once and returns the loss."""
    from rlflow.actors.policy_trainer import PolicyTrainer
    from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of

    algorithm = algorithm_of("grpo", kl={"coef": 0.0}, correction={"mode": "none"})
    trainer = PolicyTrainer(
        ModelBlock(path=model_dir), TrainerBlock(), rank=0, world_size=1, num_threads=threads, seed=0
    )
    trainer.setup(None)
    batch, denominators = pack_rows(rows), Denominators(int(rows.lengths.sum()), len(rows.lengths), GROUP)

    def once() -> float:
        loss = trainer.forward_backward([batch], algorithm, denominators)["loss/total"].value
        for parameter in trainer.module.parameters():
            parameter.grad = None
        return loss

    return once


def pack_rows(rows: Rows) -> MicroBatch:
    from rlflow.batching import pack

    samples = []
    for prompt, completion, length, advantage in zip(
        rows.prompts, rows.completions, rows.lengths, rows.advantages, strict=True
    ):
        token_ids = np.concatenate([prompt, completion[:length]]).astype(np.int32)
        mask = np.arange(len(token_ids)) >= len(prompt)
        # Each sequence's mean, then the mean over sequences: what TRL calls grpo.
        weights = mask / np.float32(length * len(rows.lengths))
        samples.append(Sample(token_ids, mask, weights.astype(np.float32), advantages=mask * advantage))
    ((batch,),) = pack(samples, max_tokens=rows.num_tokens, num_ranks=1)
    return batch


def trl_pass(model_dir: str, rows: Rows, threads: int) -> Callable[[], float]:
    """Makes the function that goes through GRPOTrainer.compute_loss and its backward pass once."""
    import torch
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlflow.data.tokenizer import load_tokenizer
    from rlflow.recipe import ModelBlock

    torch.set_num_threads(threads)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=GROUP,
        per_device_train_batch_size=len(rows.lengths),
        max_completion_length=rows.completions.shape[1],
        loss_type="grpo",
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
    )
    trainer: Any = GRPOTrainer(
        model_dir,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * GROUP),
        processing_class=load_tokenizer(ModelBlock(path=model_dir)),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    mask = torch.arange(rows.completions.shape[1]) < torch.from_numpy(rows.lengths)[:, None]
    inputs = {
        "prompt_ids": torch.from_numpy(rows.prompts),
        "prompt_mask": torch.ones(rows.prompts.shape, dtype=torch.long),
        "completion_ids": torch.from_numpy(rows.completions),
        "completion_mask": mask.long(),
        "advantages": torch.from_numpy(rows.advantages),
        "num_items_in_batch": mask.sum(),
    }

    def once() -> float:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad()
        return loss.item()

    return once


WAYS = {"TRL": trl_pass, "rlflow": rlflow_pass}


def child(connection: Connection, way: str, model_dir: str, rows: Rows, threads: int) -> None:
    """Goes through a pass whenever it is told to, and says (loss, seconds, seconds of processor time)."""
    once = WAYS[way](model_dir, rows, threads)
    once()
    connection.send(None)
    while connection.recv():
        started, used = time.perf_counter(), time.process_time()
        loss = once()
        connection.send((loss, time.perf_counter() - started, time.process_time() - used))


def receive(connection: Connection, way: str) -> Any:
    """
    Raises:
        RuntimeError: The child says nothing.
    """
    if not connection.poll(TIMEOUT_S):
        raise RuntimeError(f"{way} said nothing for {TIMEOUT_S:.0f} s")
    return connection.recv()


def measure(model_dir: str, rows: Rows, threads: int, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    context = multiprocessing.get_context("spawn")
    children, turns = {}, {way: [] for way in WAYS}
    try:
        for way in WAYS:
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(theirs, way, model_dir, rows, threads), daemon=True)
            allocator = allocator_environment() if way == "rlflow" else {}
            with patch.dict(os.environ, {"OMP_NUM_THREADS": str(threads), **allocator}):
                process.start()
            children[way] = (process, ours)
        for way, (_, connection) in children.items():
            receive(connection, way)
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                connection = children[way][1]
                connection.send(True)
                turns[way].append(receive(connection, way))
                loss, seconds, used = turns[way][-1]
                print(
                    f"{way}: loss {loss:.6f}, {seconds:.2f} s, {used:.2f} s of processors", file=sys.stderr, flush=True
                )
    finally:
        for process, _ in children.values():
            process.terminate()
            process.join()
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="completions (default 16)")
    parser.add_argument("--prompt", type=int, default=25, help="tokens of a prompt (default 25)")
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest completion (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each (default 5)")
    given = parser.parse_args()
    rows = make_rows(given.rows, given.prompt, given.longest)
    turns = measure(str(given.model_dir), rows, given.threads, given.rounds)
    print(
        f"{given.rows} rows, {rows.num_tokens} tokens, {rows.lengths.sum()} of them trained, {given.threads} threads\n"
    )
    print("| | tokens/s | tokens a second of processors | loss |\n|---|---|---|---|")
    for way, of_way in turns.items():
        wall, used = (rows.num_tokens / median(turn[column] for turn in of_way) for column in (1, 2))
        print(f"| {way} | {wall:.0f} | {used:.0f} | {of_way[0][0]:.6f} |")
    ratios = [theirs[2] / ours[2] for theirs, ours in zip(turns["TRL"], turns["rlflow"], strict=True)]
    print(f"\nrlflow to TRL: {median(ratios):.2f} times as many tokens ({min(ratios):.2f} to {max(ratios):.2f})")
    if abs(turns["TRL"][0][0] - turns["rlflow"][0][0]) > 1e-4:
        sys.exit("the losses differ: they did not train the same")


if __name__ == "__main__":
    main()
