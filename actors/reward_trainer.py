"""RewardTrainer: one rank of a reward model's training. Its export is a transformers sequence classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.actors.trainer import Objective, Trainer
from rlflow.data.tokenizer import give_own_pad, load_tokenizer, save_tokenizer
from rlflow.recipe import AlgorithmBlock, ModelBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from rlflow.algorithms.batch import TensorBatch


class RewardTrainer(Trainer):
    def load_module(self) -> Any:
        from rlflow.actors.train_engines.scalar_model import load_scalar_model

        module = load_scalar_model(
            self.block, seed=self.seed, device=self.device, checkpointing=self.trainer.gradient_checkpointing
        )
        self.tokenizer = pad_classifier(module.model, self.block)
        return module

    def export(self, directory: Path) -> None:
        """With the tokenizer that pads as the model expects."""
        super().export(directory)
        if self.rank == 0:
            save_tokenizer(self.tokenizer, directory)

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


def pad_classifier(model: PreTrainedModel, block: ModelBlock) -> PreTrainedTokenizerFast:
    """Gives a classifier a padding token that ends no conversation. Returns the tokenizer that pads with it."""
    tokenizer = load_tokenizer(block)
    pad, config = give_own_pad(tokenizer, block), model.config.get_text_config()
    if pad >= config.vocab_size:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
    # By it transformers' classifiers find a sequence's last token, which is the one that is scored here.
    config.pad_token_id = pad
    return tokenizer
