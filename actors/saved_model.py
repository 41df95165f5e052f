"""What a checkpoint's trainers would have exported, from what their ranks saved: no ranks, no engine, no optimizer.

state-*.safetensors   float32 or as trained, any number of ranks --> the files of ``final/`` that hold the model
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from rlflow.actors.checkpoint_names import kept_buffers
from rlflow.actors.model_files import write_trained
from rlflow.actors.sequence_files import pad_model, write_readers
from rlflow.actors.train_engines import sharded_state
from rlflow.actors.train_engines.sequence_model import read_sequence_model
from rlflow.actors.train_engines.sharded_state import Shard
from rlflow.actors.train_engines.token_model import choose_trained, read_language_model
from rlflow.actors.vision import language_model_class
from rlflow.checkpoint import naming_the_disk
from rlflow.recipe import AlgorithmBlock, ModelBlock
from rlflow.recipe.adapter_files import config_of_adapter
from rlflow.recipe.peft_methods import has_lora_modules

_PARTS = 20
"""Into how many the reading is cut, to tell how far it is."""

Progress = Callable[[int, int], None]
"""Hears how many weights are read, and of how many."""


def export_saved(
    checkpoint: Path, directory: Path, block: ModelBlock, *, algorithm: AlgorithmBlock, seed: int, progress: Progress
) -> None:
    """Writes what `Trainer.export` of the same recipe wrote at the checkpoint's step, to the bit.

    Args:
        checkpoint: With the state of any number of ranks of any engine.
        block: The recipe's, with a path that exists: what training started from says how names, dtype and the
            generation config are written.
        algorithm: It decides the head.

    Raises:
        ValueError: The checkpoint is of another model, or what training started from cannot be read.
        DiskError: It cannot be written.
    """
    _quiet_libraries()
    if block.adapter is not None and algorithm.learning.head != "token":
        _export_adapted_head(checkpoint, directory, block, algorithm, seed, progress)
        return
    tokenizer = None
    if block.adapter is not None:
        from rlflow.actors import adapters

        model = _adapted(block, seed)
        named = adapters.adapter_parameters(model)
        weights = {name: torch.empty(parameter.shape, dtype=torch.float32) for name, parameter in named.items()}
        trained = set(weights)
    else:
        is_policy = algorithm.learning.head == "token"
        model = read_language_model(block, seed=seed) if is_policy else read_sequence_model(block, algorithm, seed=seed)
        if is_policy:
            choose_trained(model, block)
        else:
            tokenizer = pad_model(model, block)
        weights = _places_for(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _read(checkpoint, {name: tensor for name, tensor in weights.items() if name in trained}, progress)
    if block.adapter is None:
        weights |= dict(kept_buffers(model))
    with naming_the_disk(directory, sum(tensor.nbytes for tensor in weights.values())):
        write_trained(model, block, directory, weights)
        if tokenizer is not None:
            write_readers(directory, tokenizer, block, algorithm)


def _export_adapted_head(
    checkpoint: Path, directory: Path, block: ModelBlock, algorithm: AlgorithmBlock, seed: int, progress: Progress
) -> None:
    """Of a model that says something of sequences: its adapter and its head."""
    from rlflow.actors.adapters import adapter_parameters
    from rlflow.actors.train_engines import adapted_heads

    model = read_sequence_model(block, algorithm, seed=seed)
    adapted_heads.adapt(model, block, seed=seed)
    tokenizer = pad_model(model, block)
    named = adapter_parameters(model)
    weights = {name: torch.empty(parameter.shape, dtype=torch.float32) for name, parameter in named.items()}
    _read(checkpoint, weights, progress)
    with naming_the_disk(directory, sum(tensor.nbytes for tensor in weights.values())):
        adapted_heads.write(directory, model, algorithm, weights.items())
        write_readers(directory, tokenizer, block, algorithm)


def _quiet_libraries() -> None:
    """What they say of themselves while they load and write is not for somebody who wants a model."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Otherwise DeepSpeed, which transformers imports where it is installed, warns of having looked for a device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _places_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters, to be written over: each in the dtype that engines hand out, tied ones once."""
    is_half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.data = (parameter.data.bfloat16() if is_half else parameter.data).contiguous()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _adapted(block: ModelBlock, seed: int) -> PreTrainedModel:
    """The recipe's base and adapter: their names and configs, and no weights where its method can do without."""
    from rlflow.actors import adapters

    assert block.path is not None and block.adapter is not None
    adapter_config = config_of_adapter(block.adapter)
    if adapter_config is not None and not has_lora_modules(adapter_config):
        return adapters.load_adapted(
            block, seed=seed, device=torch.device("cpu"), trust_remote_code=block.trust_remote_code
        )
    options: dict[str, Any] = {"revision": block.revision, "trust_remote_code": block.trust_remote_code}
    config = AutoConfig.from_pretrained(block.path, **options)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = language_model_class(config).from_config(config, trust_remote_code=block.trust_remote_code)
        adapters.inject(model, block, seed=seed)
    model.generation_config = _generation_config(block.path, block.revision)
    return model


def _generation_config(path: str, revision: str | None) -> GenerationConfig:
    """As ``from_pretrained`` of a model finds it."""
    options: dict[str, Any] = {"revision": revision}
    try:
        return GenerationConfig.from_pretrained(path, **options)
    except OSError:
        options |= {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(path, **options)


def _read(checkpoint: Path, weights: dict[str, torch.Tensor], progress: Progress) -> None:
    """Fills the tensors from the state; values are rounded to their dtype."""
    names = list(weights)
    size = max(1, -(-len(names) // _PARTS))
    progress(0, len(names))
    for start in range(0, len(names), size):
        part = names[start : start + size]
        shards = {f"model/{name}": Shard(weights[name].view(-1), 0, tuple(weights[name].shape)) for name in part}
        sharded_state.load(checkpoint, shards)
        progress(start + len(part), len(names))
