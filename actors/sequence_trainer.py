"""SequenceTrainer: one rank of the training of a model that says something of whole sequences: reward models,
classifiers, rerankers, embeddings. Its export is what transformers and sentence-transformers load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.sequence_files import pad_model, write_readers
from rlflow.actors.trainer import Measured, Objective, Trainer
from rlflow.checkpoint import naming_the_disk
from rlflow.metrics import Metric
from rlflow.recipe import AlgorithmBlock, ModelBlock, TrainerBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from rlflow.actors.train_engines.gradient_cache import WholeBatch
    from rlflow.algorithms.batch import TensorBatch


class SequenceTrainer(Trainer):
    def __init__(
        self,
        model: ModelBlock,
        trainer: TrainerBlock,
        *,
        rank: int,
        world_size: int,
        num_threads: int,
        seed: int,
        algorithm: AlgorithmBlock,
    ) -> None:
        """
        Args:
            algorithm: It decides the head.
        """
        super().__init__(model, trainer, rank=rank, world_size=world_size, num_threads=num_threads, seed=seed)
        self.algorithm = algorithm
        self.whole: WholeBatch | None = None
        """What the loss of a batch whose sequences it compares says of each; None outside of such a batch."""

    def load_module(self) -> Any:
        from rlflow.actors.train_engines.sequence_model import load_sequence_model

        module = load_sequence_model(
            self.block,
            self.algorithm,
            seed=self.seed,
            device=self.device,
            checkpointing=self.trainer.gradient_checkpointing,
        )
        self.tokenizer = pad_model(module.model, self.block)
        return module

    def export(self, directory: Path) -> None:
        """With the tokenizer that pads, and puts texts together, as the model expects."""
        if self.block.adapter is None:
            super().export(directory)
        else:
            self._export_adapter(directory)
        if self.rank == 0:
            write_readers(directory, self.tokenizer, self.block, self.algorithm)

    def _export_adapter(self, directory: Path) -> None:
        from rlflow.actors.train_engines import adapted_heads

        weights = {name: tensor.cpu() for name, tensor in self.engine.full_weights(trained_only=True) if self.rank == 0}
        if self.rank == 0:
            with naming_the_disk(directory, sum(tensor.nbytes for tensor in weights.values())):
                adapted_heads.write(directory, self.module.model, self.algorithm, weights.items())

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float = 1.0,
    ) -> dict[str, Metric]:
        """As every trainer's. Where the loss compares sequences of the whole batch, all of their outputs are computed
        first, without a gradient; then each micro-batch again, with the gradient that the loss has for its own."""
        if not algorithm.couples_sequences:
            return super().forward_backward(micro_batches, algorithm, denominators, temperature)
        whole = self._whole_batch(micro_batches, algorithm, denominators, wants_gradient=True)
        self.whole = whole
        of_routers = super().forward_backward(micro_batches, algorithm, denominators, temperature)
        self.whole = None
        return of_routers | whole.metrics

    def evaluate(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float = 1.0,
    ) -> Measured:
        if not algorithm.couples_sequences:
            return super().evaluate(micro_batches, algorithm, denominators, temperature)
        whole = self._whole_batch(micro_batches, algorithm, denominators, wants_gradient=False)
        return Measured(whole.loss, whole.metrics)

    def objective(
        self,
        micro_batch: MicroBatch,
        batch: TensorBatch,
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float,
    ) -> Objective:
        from rlflow.algorithms.objectives import objective_of

        outputs = self.module(micro_batch, self.device, "scores")
        if self.whole is not None:
            return self.whole.share_of(outputs, micro_batch), {}
        return objective_of(algorithm)(outputs, None, batch, algorithm, denominators)

    def outputs(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        """What the head says of each sequence, float32 [S] or [S, D] of the micro-batches end to end."""
        import torch

        with torch.no_grad():
            parts = [self.module(batch, self.device, "scores").cpu().numpy() for batch in micro_batches]
        return np.concatenate(parts)

    def _whole_batch(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        *,
        wants_gradient: bool,
    ) -> WholeBatch:
        from rlflow.actors.train_engines.gradient_cache import whole_batch
        from rlflow.algorithms.objectives import objective_of

        return whole_batch(
            micro_batches,
            lambda micro_batch: self.module(micro_batch, self.device, "scores"),
            lambda outputs, batch: objective_of(algorithm)(outputs, None, batch, algorithm, denominators),
            rank=self.rank,
            world_size=self.world_size,
            share=self.trainer.sequence_parallel,
            wants_gradient=wants_gradient,
        )
