"""Adapters of models that say something of sequences: in the decoder's layers; a classifier's head is trained whole.

    model.layers.0.self_attn.q_proj      W x + scale B A x, as in a policy
    score                                trained as it is: PEFT's modules_to_save

PEFT puts the adapter into the decoder alone, so that no head can get one.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from rlflow.actors import adapters
from rlflow.actors.train_engines.heads import SCORE
from rlflow.recipe import AlgorithmBlock, ModelBlock
from rlflow.recipe.adapter_files import WEIGHTS

_TASKS = {"scalar": "SEQ_CLS", "classes": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION", "yes_no": "CAUSAL_LM"}
"""A row's ``head`` -> PEFT's task_type."""


def adapt(model: PreTrainedModel, block: ModelBlock, *, seed: int) -> None:
    """Puts the recipe's adapter into a model; all but that and a classifier's head is frozen.

    Raises:
        ValueError: See adapters.load_adapted.
    """
    model.requires_grad_(False)
    decoder: Any = model.base_model
    adapters.inject(decoder, block, seed=seed)
    head = dict(model.named_children()).get(SCORE)
    if head is not None:
        head.requires_grad_(True)
        head.to(torch.float32)


def write(
    directory: Path,
    model: PreTrainedModel,
    algorithm: AlgorithmBlock,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """A PEFT directory, which `PeftModel.from_pretrained` puts onto the base with its head.

    Args:
        tensors: What is trained, by its names in the model.
    """
    decoder: Any = model.base_model
    prefix = "" if decoder is model else f"{model.base_model_prefix}."
    given = dict(tensors)
    own = {name.removeprefix(prefix): tensor for name, tensor in given.items() if not name.startswith(f"{SCORE}.")}
    named = get_peft_model_state_dict(decoder, state_dict=own, adapter_name=adapters.TRAINED)
    values = {f"base_model.model.{prefix}{name}": tensor for name, tensor in named.items()}
    head = {f"base_model.model.{name}": tensor for name, tensor in given.items() if name.startswith(f"{SCORE}.")}
    assert len(values) + len(head) == len(given), "PEFT leaves out what was trained"
    config: Any = deepcopy(adapters.config_of(decoder))
    config.inference_mode, config.task_type = True, _TASKS[algorithm.learning.head]
    config.modules_to_save = [SCORE] if head else None
    config.save_pretrained(str(directory))
    written = {name: tensor.cpu().contiguous() for name, tensor in {**values, **head}.items()}
    save_file(written, directory / WEIGHTS, metadata={"format": "pt"})


def put_on(model: PreTrainedModel, directory: Path) -> None:
    """Merges the adapter of a directory, and its head, into the base that it was trained on."""
    PeftModel.from_pretrained(model, str(directory)).merge_and_unload()  # pyright: ignore[reportCallIssue]
