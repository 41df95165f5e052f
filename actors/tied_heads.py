"""A head that is the embeddings, where an adapter is on one of the two: merged, they are two matrices."""

from __future__ import annotations

from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def untie_what_is_adapted(model: PreTrainedModel) -> None:
    """Gives the head a matrix of its own before an adapter on it or on the embeddings is merged into the one of both.

    PEFT computes an adapter on one of them beside the other, and merges it into both. It keeps trained tokens, and
    whole layers that are trained, apart or together by itself.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = [
        layer
        for layer in (embedding, head)
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
    ]
    if not adapted or head is None:
        return
    one, other = (_base_of(layer) for layer in (embedding, head))
    if one.weight is other.weight:
        other.weight = nn.Parameter(other.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _base_of(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
