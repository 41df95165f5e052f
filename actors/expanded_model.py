"""Block expansion (LLaMA Pro, arXiv 2401.02415, section 3.2): a model with new layers that do nothing yet.

    base     0  1  2  3          initial_model/   0  1  1' 2  3  3'
                                                        new, trained: output projections 0, x + 0 = x

What is written is a plain model of its architecture, so that trainers, engines and references load it as any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from rlflow.actors.checkpoint_names import kept_buffers
from rlflow.actors.model_files import save_model
from rlflow.actors.pretrained import load_whole
from rlflow.actors.train_engines.engine import decoder_layers
from rlflow.actors.vision import has_tower, language_model_class
from rlflow.checkpoint import FINAL_MANIFEST, publish_directory
from rlflow.recipe import ModelBlock
from rlflow.recipe.expand_block import ExpandBlock, LayerOrigin

_OUTPUTS = {
    *("o_proj", "out_proj", "c_proj", "dense", "wo"),
    *("down_proj", "dense_4h_to_h", "fc2", "w2", "output_linear"),
}
"""What architectures call the projections whose results are added to what a layer was given."""
_WRITTEN_ANEW = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "config.json", "args.json")
_PROBE = 24
"""Tokens of the text that both models read."""


def write_expanded(block: ModelBlock, directory: Path) -> None:
    """Writes the recipe's model with its new layers, whole or not at all; its weights are read once, on the CPU.

    Raises:
        ValueError: The architecture's layers cannot be added to, or its logits would be others.
        DiskError: It cannot be written.
    """
    assert block.path is not None and block.expand is not None
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": block.revision, "trust_remote_code": block.trust_remote_code}
    config = AutoConfig.from_pretrained(block.path, **options)
    if problem := _problem(config, block.expand):
        raise ValueError(f"model.expand: {problem}")
    model = load_whole(language_model_class(config), block.path, dtype=getattr(torch, block.dtype), **options)
    before = _logits(model)
    origins = block.expand.layers(model.config.num_hidden_layers)
    weights = _expanded_weights(model, origins)
    model.config.update(_expanded_config(model.config.to_dict(), origins))

    def write(target: Path) -> None:
        _copy_beside_weights(block, target)
        save_model(model, target, weights)
        expanded = load_whole(
            language_model_class(config),
            str(target),
            dtype=getattr(torch, block.dtype),
            trust_remote_code=block.trust_remote_code,
        )
        if not torch.equal(_logits(expanded), before):
            kind = type(model).__name__
            raise ValueError(
                f"model.expand: {kind} with new layers computes other logits than before: train an adapter"
            )

    publish_directory(directory, {"base": block.path}, write, FINAL_MANIFEST)


def train_new_layers(model: PreTrainedModel, expand: ExpandBlock) -> None:
    """Freezes all of an expanded model but its new layers."""
    layers = decoder_layers(model)
    origins = expand.layers(len(layers) - expand.new_layers)
    model.requires_grad_(False)
    for layer, origin in zip(layers, origins, strict=True):
        layer.requires_grad_(origin.is_new)


def _problem(config: Any, expand: ExpandBlock) -> str | None:
    """Why a model cannot get new layers, as far as its config tells."""
    if has_tower(config):
        return "is of models that read text alone: train an adapter"
    if getattr(config, "quantization_config", None) is not None:
        return "the model is quantised: name the one that it was made of"
    return expand.problem(config.num_hidden_layers)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """[1, L, V] of one text, in evaluation mode."""
    ids = torch.arange(_PROBE)[None] * 7 % model.config.vocab_size
    return model.eval()(input_ids=ids).logits


def _expanded_weights(model: PreTrainedModel, origins: list[LayerOrigin]) -> dict[str, torch.Tensor]:
    """By name, tied ones once; no two share memory.

    Raises:
        ValueError: A layer has none of the projections that are known to end it.
    """
    layers = decoder_layers(model)
    (prefix,) = (name for name, module in model.named_modules() if module is layers)
    kept = {**dict(kept_buffers(model)), **dict(model.named_parameters())}
    weights = {name: tensor for name, tensor in kept.items() if not name.startswith(f"{prefix}.")}
    for index, origin in enumerate(origins):
        source = f"{prefix}.{origin.source}."
        own = {name.removeprefix(source): tensor for name, tensor in kept.items() if name.startswith(source)}
        if origin.is_new:
            ends = {name for name in own if any(part.removesuffix("_bias") in _OUTPUTS for part in name.split("."))}
            if not ends:
                raise ValueError(f"model.expand: {type(model).__name__} has layers of a kind that is not known here")
            own = {name: tensor.clone().zero_() if name in ends else tensor.clone() for name, tensor in own.items()}
        weights |= {f"{prefix}.{index}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.detach() for name, tensor in weights.items()}


def _expanded_config(config: Mapping[str, Any], origins: list[LayerOrigin]) -> dict[str, Any]:
    """The fields that change: how many layers there are, and what is said of each."""
    count = config["num_hidden_layers"]
    fields: dict[str, Any] = {"num_hidden_layers": len(origins)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and ("layer" in name or "block" in name):
            fields[name] = [value[origin.source] for origin in origins]
    if config.get("mlp_only_layers"):
        dense = config["mlp_only_layers"]
        fields["mlp_only_layers"] = [index for index, origin in enumerate(origins) if origin.source in dense]
    if config.get("first_k_dense_replace"):
        first = config["first_k_dense_replace"]
        fields["first_k_dense_replace"] = sum(origin.source < first for origin in origins)
    return fields


def _copy_beside_weights(block: ModelBlock, target: Path) -> None:
    """Copies the tokenizer and all else that lies beside a model's weights."""
    assert block.path is not None
    source = Path(block.path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(block.path, revision=block.revision, ignore_patterns=list(_WRITTEN_ANEW)))
    for file in source.iterdir():
        if file.is_file() and file.name != FINAL_MANIFEST and not any(file.match(end) for end in _WRITTEN_ANEW):
            shutil.copyfile(file, target / file.name)


def is_written(directory: Path) -> bool:
    """Whether an earlier start of the run has written the expanded model, whole."""
    try:
        return bool(json.loads((directory / FINAL_MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError):
        return False
