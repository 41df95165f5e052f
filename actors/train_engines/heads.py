"""What is read from a decoder's hidden states, a number or several: a classifier's score, an embedding, yes or no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from rlflow.actors.train_engines.token_model import logit_scale

SCORE = "score"
"""Transformers' name of a classifier's last layer."""


class Head(Protocol):
    def __call__(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, H] -> float32 [M], or [M, D] of several numbers."""
        ...

    def of_last(self, model: PreTrainedModel, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The same of the last token of one sequence [L], by transformers' own forward pass: [1] or [1, D].

        Args:
            inputs: What of its pictures goes with the tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """A classifier's last layer."""

    is_scalar: bool = True
    """It has one number, which stands alone."""

    def __call__(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        score = model.get_submodule(SCORE)
        assert isinstance(score, nn.Linear)
        # Beside an adapter it is kept in more bits than the decoder.
        outputs = score(hidden.to(score.weight.dtype)).float()
        return outputs.squeeze(-1) if self.is_scalar else outputs

    def of_last(self, model: PreTrainedModel, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=token_ids[None], **inputs).logits.float()
        return logits.squeeze(-1) if self.is_scalar else logits


@dataclass(frozen=True, slots=True)
class EmbeddingHead:
    """The hidden state itself."""

    def __call__(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float()

    def of_last(self, model: PreTrainedModel, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token_ids[None], **inputs).last_hidden_state[:, -1].float()


@dataclass(frozen=True, slots=True)
class YesNoHead:
    """By how much the logit of one token is above that of another: the log-odds of yes against no."""

    yes: int
    no: int

    def __call__(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        layer, config = model.get_output_embeddings(), model.config.get_text_config().to_dict()
        assert isinstance(layer, nn.Linear)
        logits = F.linear(hidden, layer.weight, layer.bias).float() * logit_scale(config)
        if (cap := config.get("final_logit_softcapping", config.get("logits_soft_cap"))) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits[:, self.yes] - logits[:, self.no]

    def of_last(self, model: PreTrainedModel, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=token_ids[None], **inputs).logits[:, -1].float()
        return logits[:, self.yes] - logits[:, self.no]


def one_number(outputs: torch.Tensor) -> torch.Tensor:
    """[M] of a head's outputs [M] or [M, D]: of several numbers the same mixture always."""
    if outputs.ndim == 1:
        return outputs
    size = outputs.shape[-1]
    mixture = torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5
    return outputs @ mixture.to(outputs.device)
