"""RewardTrainer: one rank of a reward model's training. Its export is a transformers sequence classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlflow.actors.trainer import Objective, Trainer
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import AlgorithmBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from rlflow.algorithms.batch import TensorBatch


class RewardTrainer(Trainer):
    def load_module(self) -> Any:
        from rlflow.actors.train_engines.scalar_model import load_scalar_model

        module = load_scalar_model(
            self.block, seed=self.seed, device=self.device, checkpointing=self.trainer.gradient_checkpointing
        )
        # transformers' classifiers find a sequence's last token by it, and refuse batches without one.
        if module.model.config.pad_token_id is None:
            module.model.config.pad_token_id = load_tokenizer(self.block).pad_token_id
        return module

    def objective(
        self,
        micro_batch: MicroBatch,
        batch: TensorBatch,
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float,
    ) -> Objective:
        from rlflow.algorithms.objectives import objective_of

        scores = self.module(micro_batch, self.device, "scores")
        return objective_of(algorithm)(scores, None, batch, algorithm, denominators)
