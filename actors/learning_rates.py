"""Learning rates that are not the trainer's: of parts of a model, and of adapters' B."""

from __future__ import annotations

from transformers import PreTrainedModel

from rlflow.actors.vision import part_finder
from rlflow.recipe import ModelBlock


def learning_rate_shares(model: PreTrainedModel, block: ModelBlock, learning_rate: float) -> dict[str, float]:
    """Of every parameter that is trained, by its name, its learning rate over ``learning_rate``.

    Parts have those of the recipe; adapters' B have LoRA+'s ratio times it (arXiv 2402.12354).
    """
    part_of = part_finder(model)
    ratio = 1.0 if block.adapter is None else block.adapter.lora_plus_ratio or 1.0
    return {
        name: block.learning_rates.get(part_of(name), learning_rate)
        / learning_rate
        * (ratio if ".lora_B." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
