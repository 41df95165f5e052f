"""PolicyTrainer: one rank of the policy's training. It knows verbs, not algorithms: the recipe's row binds the loss."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlflow.recipe import AlgorithmBlock, ModelBlock, TrainerBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from actors.weight_sync import WeightSnapshot


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What optim_step reports."""

    grad_norm: float
    """Before clipping; NaN when the step was skipped."""
    skipped: bool
    """The gradient was not finite: no parameter and no moment changed."""


class PolicyTrainer:
    def __init__(
        self, model: ModelBlock, trainer: TrainerBlock, *, rank: int, world_size: int, num_threads: int, seed: int
    ) -> None:
        self.block, self.trainer = model, trainer
        self.rank, self.world_size = rank, world_size
        self.num_threads, self.seed = num_threads, seed

    def rendezvous(self) -> str:
        """``host:port`` on which rank 0's process group can listen."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"

    def setup(self, address: str | None) -> float:
        """Loads the model, joins the other ranks. Returns seconds."""
        import torch

        from actors.train_engines.fsdp_engine import FsdpEngine, init_process_group
        from actors.train_engines.token_model import load_token_model

        started = time.perf_counter()
        torch.set_num_threads(self.num_threads)
        torch.manual_seed(self.seed)
        self.device = torch.device("cuda" if self.trainer.gpus_per_worker else "cpu")
        if address is not None:
            init_process_group(self.rank, self.world_size, address, self.trainer.timeout_s)
        module = load_token_model(
            self.block, seed=self.seed, device=self.device, checkpointing=self.trainer.gradient_checkpointing
        )
        self.engine = FsdpEngine(module, self.trainer, rank=self.rank, world_size=self.world_size)
        return time.perf_counter() - started

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Adds the gradient of this rank's micro-batches.

        Returns:
            The objective's metrics, each this rank's share of a global sum: adding over ranks gives the batch's value
            (names ending in ``_max`` combine by maximum).
        """
        from rlflow.algorithms.batch import TensorBatch
        from rlflow.algorithms.objectives import objective_of

        objective = objective_of(algorithm)
        totals: dict[str, float] = {}
        for micro_batch in micro_batches:
            batch = TensorBatch.from_numpy(micro_batch, self.device)
            outputs = self.engine.module.of_batch(
                micro_batch, self.device, temperature, entropy_gradient=algorithm.loss.entropy_coef != 0
            )
            loss, metrics = objective(outputs.logprobs, outputs.entropies, batch, algorithm, denominators)
            self.engine.backward(loss)
            for name, value in metrics.items():
                combine(totals, name, float(value))
        return totals

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probabilities of the loss tokens under the current policy, float32 [N] for each micro-batch."""
        from actors.train_engines.token_model import score

        return score(self.engine.module, micro_batches, self.device, temperature)

    def optim_step(self, learning_rate: float) -> UpdateStats:
        """Clips and applies the gradient that forward_backward gathered."""
        grad_norm = self.engine.step(learning_rate)
        return UpdateStats(float("nan") if grad_norm is None else grad_norm, grad_norm is None)

    def weights(self, version: int) -> WeightSnapshot | None:
        """All ranks take part; rank 0 returns the snapshot."""
        from actors.weight_sync import pack_weights

        named = self.engine.full_weights()
        if self.rank == 0:
            return pack_weights(named, version)
        for _ in named:
            pass
        return None

    def save(self, directory: Path) -> None:
        """Writes this rank's part of a checkpoint into an existing directory."""
        self.engine.save_state(directory)

    def load(self, directory: Path) -> None:
        """Takes up the state that any number of ranks saved."""
        self.engine.load_state(directory)

    def export(self, directory: Path) -> None:
        """Writes a Hugging Face directory: weights as safetensors, config. The driver adds the tokenizer."""
        weights = dict(self.engine.full_weights())
        if self.rank == 0:
            model = self.engine.module.model
            model.config._attn_implementation = "sdpa"
            model.save_pretrained(directory, state_dict={name: tensor.cpu() for name, tensor in weights.items()})


def combine(totals: dict[str, float], name: str, value: float) -> None:
    """Adds a metric to running totals; names ending in ``_max`` keep the larger."""
    if name not in totals:
        totals[name] = value
    elif name.endswith("_max"):
        totals[name] = max(totals[name], value)
    else:
        totals[name] += value
