"""PolicyTrainer: one rank of the policy's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.trainer import Objective, Trainer
from rlflow.recipe import AlgorithmBlock, ModelBlock, OnlineBlock, TrainerBlock
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from rlflow.actors.teacher_model import TeacherHead
    from rlflow.actors.train_engines.divergences import LoadedHead
    from rlflow.actors.train_engines.token_model import Entropies
    from rlflow.algorithms.batch import TensorBatch


class PolicyTrainer(Trainer):
    def __init__(
        self,
        model: ModelBlock,
        trainer: TrainerBlock,
        *,
        rank: int,
        world_size: int,
        num_threads: int,
        seed: int,
        has_tokens_alone: bool = False,
        sends_merged: bool = False,
        transport: str = "objects",
        reference: str | None = None,
    ) -> None:
        """
        Args:
            has_tokens_alone: Ids beyond its tokenizer's get no probability: it is trained on what it writes, in which
                there are none, or compared with a teacher whose embedding may be padded to another size.
            sends_merged: Engines get whole weights, with what the adapter makes of them.
            transport: How engines get new weights: objects, ipc or collective.
            reference: Path of the adapter that makes the base the reference; None where the base alone is.
        """
        super().__init__(model, trainer, rank=rank, world_size=world_size, num_threads=num_threads, seed=seed)
        self.has_tokens_alone = has_tokens_alone
        self.sends_merged, self.transport = sends_merged, transport
        self.reference = reference
        self.teacher_head: LoadedHead | None = None

    def load_module(self) -> Any:
        from rlflow.actors.train_engines.token_model import load_token_model

        return load_token_model(
            self.block,
            seed=self.seed,
            device=self.device,
            checkpointing=self.trainer.gradient_checkpointing,
            tokens_of=self.block if self.has_tokens_alone else None,
            reference=self.reference,
        )

    def objective(
        self,
        micro_batch: MicroBatch,
        batch: TensorBatch,
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float,
    ) -> Objective:
        from rlflow.algorithms.objectives import objective_of

        divergence = None
        if isinstance(algorithm, OnlineBlock) and isinstance(algorithm.distill, DivergenceDistillBlock):
            from rlflow.actors.train_engines.divergences import BatchDivergence

            divergence = BatchDivergence(algorithm.distill, batch, self.teacher_head)
        outputs = self.module.of_batch(micro_batch, self.device, temperature, self._entropies(algorithm), divergence)
        if divergence is not None:
            batch = replace(batch, divergences=outputs.divergences)
        return objective_of(algorithm)(outputs.logprobs, outputs.entropies, batch, algorithm, denominators)

    def take_teacher_head(self, head: TeacherHead) -> None:
        """Takes what makes logits of a teacher's hidden states; before the first update."""
        from rlflow.actors.train_engines.divergences import LoadedHead

        self.teacher_head = LoadedHead(head, self.device)

    def _entropies(self, algorithm: AlgorithmBlock) -> Entropies:
        """Preference losses have no use for them; Liger's kernel, which has none, is worth more than SFT's metric."""
        if isinstance(algorithm, OnlineBlock) and algorithm.loss.entropy_coef:
            return "gradient"
        learning = algorithm.learning
        return "values" if learning.has_entropies and not (learning.family == "sft" and self.block.liger) else "none"

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of the loss tokens under the current policy, float32 [N] of the batches end to end."""
        from rlflow.actors.train_engines.token_model import score

        return score(self.module, micro_batches, self.device, temperature)

    def reference_logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> np.ndarray:
        """As ``logprobs``, of the base, or of the adapter ``reference`` on it: a ReferenceModel's numbers without its
        copy."""
        from rlflow.actors.adapters import as_reference

        with as_reference(self.module.model):
            return self.logprobs(micro_batches, temperature)
