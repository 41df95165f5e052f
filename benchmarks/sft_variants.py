"""The ways to train that benchmarks/sft_throughput.py compares: each is one process a rank, and trains when told to."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rlflow.data.examples import Example
    from rlflow.types import MicroBatch


@dataclass(frozen=True)
class Variant:
    about: str
    """For the page."""
    ranks: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keys of rlflow's trainer block."""
    padded: bool = False
    whole_logits: bool = False
    trl: dict[str, Any] | None = None
    """Options of SFTConfig: TRL trains instead of rlflow."""


ZERO_2 = {"engine": "deepspeed", "deepspeed": {"stage": 2}}
BASE = "packed, chunked logits"
VARIANTS = {
    BASE: Variant("rlflow's defaults on one rank (the FSDP engine, which wraps nothing there)"),
    "padded": Variant("every row filled up to the longest of the step", padded=True),
    "whole logits": Variant("the logits of all loss tokens at once, kept for the backward pass", whole_logits=True),
    "checkpointing": Variant("layers recomputed in the backward pass", trainer={"gradient_checkpointing": True}),
    "ZeRO-2, 1 rank": Variant("DeepSpeed in place of the FSDP engine", trainer=ZERO_2),
    "FSDP2, 2 ranks": Variant("weights, gradients and moments sharded", ranks=2),
    "ZeRO-2, 2 ranks": Variant("gradients and moments sharded", ranks=2, trainer=ZERO_2),
    "TRL, padded": Variant("SFTTrainer as it comes, but for gradient checkpointing, which is off", trl={}),
    "TRL, padding-free": Variant(
        "SFTTrainer with padding_free: the rows end to end, a block-causal mask where there is no flash attention",
        trl={"padding_free": True},
    ),
}


@dataclass(frozen=True)
class Settings:
    model: str
    data: dict[str, Any]
    """rlflow's data block."""
    examples: Sequence[Example]
    """Its rows, in the order they are trained."""
    learning_rate: float
    cores: int
    """Compute threads of all ranks together."""
    directory: str
    """For logs, and for what a trainer insists on writing."""
    chunk_elements: int | None = None
    """Logits that rlflow holds at a time; None: as many as it does by itself."""

    @property
    def rows_per_step(self) -> int:
        return self.data["prompts_per_step"]

    def threads_of(self, name: str) -> int:
        """Of each rank."""
        return max(1, self.cores // VARIANTS[name].ranks)

    @property
    def steps(self) -> list[Sequence[Example]]:
        starts = range(0, len(self.examples), self.rows_per_step)
        return [self.examples[start : start + self.rows_per_step] for start in starts]

    @property
    def tokens_of_steps(self) -> list[int]:
        return [sum(len(example.token_ids) for example in step) for step in self.steps]


@dataclass(frozen=True)
class Report:
    """Of one optimizer step, by one rank."""

    seconds: float
    loss: float
    """This rank's share of the mean over the step's loss tokens."""
    num_tokens: int
    """That the step trained on, on all ranks, prompts included, as the trainer counted them."""
    peak_bytes: int
    """The most this process ever held in memory."""


def run_rank(connection: Connection, name: str, settings: Settings, rank: int, address: str | None) -> None:
    """The whole life of a process: load, say so (None), then a Report for every message from the parent."""
    descriptor = os.open(log_of(settings, name, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if VARIANTS[name].trl is None:
        train_rlflow(connection, name, settings, rank, address)
    else:
        train_trl(connection, VARIANTS[name], settings)


def log_of(settings: Settings, name: str, rank: int) -> str:
    """The file that has what the process printed."""
    return os.path.join(settings.directory, f"{name.replace(' ', '_')}.{rank}.log")


def train_rlflow(connection: Connection, name: str, settings: Settings, rank: int, address: str | None) -> None:
    from rlflow.actors.policy_trainer import PolicyTrainer
    from rlflow.actors.train_engines import token_model
    from rlflow.algorithms.weighing import weigh
    from rlflow.batching import pack
    from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of
    from rlflow.types import Sample

    variant = VARIANTS[name]
    if variant.whole_logits or settings.chunk_elements is not None:
        token_model._CHUNK_BYTES = sys.maxsize if variant.whole_logits else 4 * settings.chunk_elements
    trainer = PolicyTrainer(
        ModelBlock(path=settings.model),
        TrainerBlock.model_validate({"workers": variant.ranks, **variant.trainer}),
        rank=rank,
        world_size=variant.ranks,
        num_threads=settings.threads_of(name),
        seed=0,
    )
    trainer.setup(address)
    algorithm = algorithm_of("sft")
    max_tokens = max(settings.tokens_of_steps)
    connection.send(None)
    for step in settings.steps:
        samples = [Sample(e.token_ids, e.loss_mask, np.zeros(len(e.token_ids), np.float32)) for e in step]
        connection.recv()
        started = time.perf_counter()
        weighed, denominators = weigh(samples, algorithm, max_tokens)
        packed = pack(weighed, max_tokens=max_tokens, num_ranks=variant.ranks)
        own = [padded(batch) for batch in packed[rank]] if variant.padded else packed[rank]
        metrics = trainer.forward_backward(own, algorithm, denominators)
        stats = trainer.optim_step(settings.learning_rate)
        seconds = time.perf_counter() - started
        assert not stats.skipped, "the gradient was not finite"
        num_tokens = sum(of_rank.num_real_tokens for of_rank in packed)
        connection.send(Report(seconds, metrics["loss/sft"].value, num_tokens, peak_bytes()))


def padded(batch: MicroBatch) -> MicroBatch:
    """The same sequences, all as long as the longest: filler behind their tokens, which no token of theirs can see."""
    lengths = np.diff(batch.cu_seqlens)
    column = np.arange(lengths.max(), dtype=np.int32)
    real = column < lengths[:, None]

    def spread(values: np.ndarray) -> np.ndarray:
        result = np.zeros(real.shape, values.dtype)
        result[real] = values
        return result.ravel()

    return replace(
        batch,
        token_ids=spread(batch.token_ids),
        position_ids=np.tile(column, len(lengths)),
        cu_seqlens=np.arange(len(lengths) + 1, dtype=np.int32) * len(column),
        loss_mask=spread(batch.loss_mask),
        loss_weights=spread(batch.loss_weights),
    )


def train_trl(connection: Connection, variant: Variant, settings: Settings) -> None:
    import torch
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    from rlflow.data.tokenizer import load_tokenizer
    from rlflow.recipe import ModelBlock

    torch.set_num_threads(settings.cores)
    rows = [
        {"input_ids": e.token_ids.tolist(), "labels": np.where(e.loss_mask, e.token_ids, -100).tolist()}
        for e in settings.examples
    ]
    SFTTrainer(
        settings.model,
        args=trl_config(variant, settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(ModelBlock(path=settings.model)),
        callbacks=[trl_turns(connection)],
    ).train()


def trl_config(variant: Variant, settings: Settings) -> Any:
    """The options of rlflow's trainer, in TRL's words."""
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=os.path.join(settings.directory, "trl"),
        model_init_kwargs={"dtype": "float32"},
        max_steps=len(settings.steps),
        per_device_train_batch_size=settings.rows_per_step,
        train_sampling_strategy="sequential",
        max_length=None,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **(variant.trl or {}),
    )


def trl_turns(connection: Connection) -> Any:
    """Waits before each step for the parent's message, and reports behind it.

    Timed from the first forward pass to after the optimizer: collating and logging are not in it.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        started = seconds = 0.0
        num_tokens = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            connection.send(None)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            connection.recv()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                before, self.num_tokens = self.num_tokens, int(logs["num_tokens"])
                connection.send(Report(self.seconds, logs["loss"], self.num_tokens - before, peak_bytes()))

    return Turns()


def peak_bytes() -> int:
    """VmHWM of this process."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
