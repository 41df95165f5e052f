"""ValueTrainer: one rank of the critic's training (PPO). The same engines and verbs as the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.trainer import Objective, Trainer
from rlflow.recipe import AlgorithmBlock, OnlineBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from rlflow.algorithms.batch import TensorBatch


class ValueTrainer(Trainer):
    moe_prefix = "critic_"

    def load_module(self) -> Any:
        from rlflow.actors.train_engines.scalar_model import load_scalar_model

        return load_scalar_model(
            self.block, seed=self.seed, device=self.device, checkpointing=self.trainer.gradient_checkpointing
        )

    def objective(
        self,
        micro_batch: MicroBatch,
        batch: TensorBatch,
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float,
    ) -> Objective:
        from rlflow.algorithms.policy_objectives import value_objective

        assert isinstance(algorithm, OnlineBlock)

        values = self.module(micro_batch, self.device, "values")
        return value_objective(values, None, batch, algorithm, denominators)

    def values(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        """The critic's value before each loss token, float32 [N] of the micro-batches end to end."""
        import torch

        with torch.no_grad():
            parts = [self.module(batch, self.device, "values").cpu().numpy() for batch in micro_batches]
        return np.concatenate(parts)
