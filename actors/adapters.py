"""Adapters through PEFT, put into a transformers model in place: no wrapper, so all else sees the model it knows.

    model.layers.0.mlp.up_proj               y = W x + scale B A x, or what another method makes of W
        .base_layer.weight                   W, frozen, in the recipe's dtype
        .lora_A.default.weight, .lora_B...   float32, trained, and all that checkpoints hold
        .lora_A.reference.weight, ...        only where the reference is an adapter too: frozen

Of LoRA and DoRA, weight syncs hold no more than that: trainer and torch engine have the same modules, so what is
generated is scored by the same arithmetic. Engines get what other methods have trained as whole weights (merging).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rlflow.actors.adapted_layers import layers_left_out
from rlflow.actors.adapter_targets import check_layers, check_named, check_targets, within_parts
from rlflow.actors.pretrained import load_whole
from rlflow.actors.quantized_bases import check_quantized, keep_as_stored, quantized
from rlflow.actors.vision import has_tower, language_model_class
from rlflow.recipe import ModelBlock
from rlflow.recipe.adapter_files import CONFIG, WEIGHTS, adapter_problem, mixed_kinds
from rlflow.recipe.peft_methods import METHODS, TYPE

TRAINED, REFERENCE = "default", "reference"
"""PEFT's names of the adapter that is trained and of the one it is compared with."""
_PATH = "model.adapter.path"
"""The recipe's key of the adapter that training starts from."""
SUBTRACTED = "subtracted"
"""Of one that takes away what the trained one adds at the start."""


def load_adapted(
    block: ModelBlock, *, seed: int, device: torch.device, reference: str | None = None, **options: Any
) -> PreTrainedModel:
    """The base model with an adapter that changes nothing yet, or with the one at ``adapter.path``.

    Args:
        reference: Directory or hub id of an adapter to hold as well, frozen, for ``as_reference``.
        options: Of from_pretrained.

    Raises:
        ValueError: Nothing here to adapt, an adapter of another model, a checkpoint that lacks weights, or what
            quantises the base is missing; each with a remedy.
    """
    adapter = block.adapter
    assert adapter is not None and block.path is not None
    dtype = getattr(torch, block.dtype)
    if adapter.quantize != "none":
        check_quantized(adapter.quantize)
        options["quantization_config"] = quantized(adapter.quantize, dtype)
    config = AutoConfig.from_pretrained(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
    options |= {"revision": block.revision, "has_adapter": True}
    model = load_whole(language_model_class(config), block.path, dtype=dtype, **options)
    if adapter.quantize == "nf4":
        keep_as_stored(model)
    model.to(device)  # pyright: ignore[reportArgumentType]
    inject(model, block, seed=seed)
    if reference is not None:
        _hold_reference(model, block, reference)
    return model


def inject(model: PreTrainedModel, block: ModelBlock, *, seed: int) -> None:
    """Puts the adapter of a recipe's model block into a model. All else is frozen; every rank starts from the same A.

    Raises:
        ValueError: See load_adapted.
    """
    adapter = block.adapter
    assert adapter is not None and block.path is not None
    directory = None if adapter.path is None else _local(adapter.path, block.path, _PATH)
    fields = adapter.config if directory is None else None
    config: Any = settled_config(model, block, fields, directory)
    if directory is not None and adapter.prepared_start is None:
        _settle_dropout(config, adapter.dropout)
    torch.manual_seed(seed)
    _put_in(model, config, TRAINED)
    check_layers(model, config)
    if directory is None:
        check_named(model, config, fields or {})
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    if directory is None:
        return
    values = load_file(directory / WEIGHTS)
    _fill(model, TRAINED, values, directory, _PATH)
    if adapter.subtracts_start:
        _subtract(model, config, values, directory)


def _hold_reference(model: PreTrainedModel, block: ModelBlock, path: str) -> None:
    """Puts the adapter in that the trained one is compared with; it may be on other layers.

    Raises:
        ValueError: It is of another model or method.
    """
    assert block.path is not None
    key = _PATH if block.adapter is not None and path == block.adapter.path else "reference.adapter"
    directory = _local(path, block.path, key)
    config: Any = settled_config(model, block, None, directory)
    kinds = kind_of(config), kind_of(config_of(model))
    if kinds[0] != kinds[1]:
        raise ValueError(f"{key}: {mixed_kinds(directory, *kinds)}")
    _settle_dropout(config, 0.0)
    _put_beside(model, config, REFERENCE, load_file(directory / WEIGHTS), directory, key)
    check_layers(model, config, key)


def settled_config(
    model: PreTrainedModel, block: ModelBlock, fields: dict[str, Any] | None, directory: Path | None = None
) -> Any:
    """PEFT's config of the adapter in a recipe's model block, with the layers of this model that it is for.

    Args:
        fields: Of a new adapter.
        directory: Of one on disk.

    Raises:
        ValueError: PEFT does not take the fields, or the model has no such layers.
    """
    config: Any = _new_config(fields) if fields is not None else PeftConfig.from_pretrained(str(directory))
    check_targets(model, config)
    if directory is None and has_tower(model.config) and METHODS[kind_of(config)].targets_linear:
        config.target_modules = within_parts(model, config, block.train)
    if config.target_modules == "all-linear" and (left_out := layers_left_out(model)):
        config.exclude_modules = left_out
    config.base_model_name_or_path, config.revision = block.path, block.revision
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    return config


def _put_beside(
    model: PreTrainedModel,
    config: PeftConfig,
    name: str,
    values: dict[str, torch.Tensor],
    directory: Path,
    key: str = _PATH,
) -> None:
    """Puts a second adapter in, frozen, which computes nothing yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        _put_in(model, deepcopy(config), name)
    _fill(model, name, values, directory, key)
    for layer in adapter_layers(model):
        layer.set_adapter(TRAINED)


def _subtract(model: PreTrainedModel, config: PeftConfig, values: dict[str, torch.Tensor], directory: Path) -> None:
    """Has the model take away what the adapter starts from, s B0 A0."""
    negative = {name: -tensor if ".lora_B." in name else tensor for name, tensor in values.items()}
    _put_beside(model, config, SUBTRACTED, negative, directory)
    for layer in adapter_layers(model):
        layer._active_adapter = [TRAINED, SUBTRACTED]


def _new_config(fields: dict[str, Any]) -> PeftConfig:
    """
    Raises:
        ValueError: PEFT does not take these values together.
    """
    try:
        return get_peft_config(dict(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.adapter: {fields[TYPE]}: {error}") from error


def _settle_dropout(config: PeftConfig, dropout: float) -> None:
    """Of an adapter on disk, whose own was of another training."""
    for field in vars(config):
        if field.endswith("dropout"):
            setattr(config, field, dropout if field == "lora_dropout" else 0.0)


def _put_in(model: PreTrainedModel, config: PeftConfig, name: str) -> None:
    """
    Raises:
        ValueError: The method finds nothing to adapt, or sizes that it cannot take.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    try:
        # inject_adapter_in_model does no more, and refuses methods whose layers share matrices that are made of a seed.
        tuner(model, config, name)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"model.adapter: {kind_of(config)}: {error}") from error


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers, each around one of the model's."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by its name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Within, the model is what training is compared with: the base alone, or with the adapter that is held for it."""
    layers = adapter_layers(model)
    is_adapter = any(name.endswith(f".{REFERENCE}") or f".{REFERENCE}." in name for name, _ in model.named_parameters())
    # PEFT's own switches also change which parameters want gradients, which sharded ones must not.
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [REFERENCE if is_adapter else TRAINED]
        layer._disable_adapters = not is_adapter
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names
            layer._disable_adapters = False


def write(directory: Path, model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A PEFT directory: adapter_config.json, adapter_model.safetensors.

    Args:
        tensors: By their names in the model, as the trainer sends them.
    """
    config: Any = deepcopy(config_of(model))
    config.inference_mode = True
    if isinstance(config.target_modules, set | list) and METHODS[kind_of(config)].targets_linear:
        config.target_modules = _short_names(config.target_modules, model)
    config.save_pretrained(str(directory))
    given = dict(tensors)
    values = _in_file(model, TRAINED, {**_kept_buffers(model), **given})
    assert len(values) >= len(given), "PEFT leaves out what was trained"
    written = {name: tensor.cpu().contiguous() for name, tensor in values.items()}
    save_file(written, directory / WEIGHTS, metadata={"format": "pt"})


def kind_of(config: PeftConfig) -> str:
    """PEFT's name of the method."""
    return PeftType(config.peft_type).value


def config_of(model: PreTrainedModel) -> PeftConfig:
    configs: Any = model.peft_config
    return configs[TRAINED]


def largest_rank(model: PreTrainedModel) -> int:
    """Of a LoRA."""
    return max(layer.r[TRAINED] for layer in adapter_layers(model) if _is_trained(layer))


def _is_trained(layer: Any) -> bool:
    """Whether one of PEFT's layers has the adapter that is trained, and not the reference's alone."""
    return TRAINED in layer._get_available_adapters()


def _local(path: str, model: str, key: str) -> Path:
    """The adapter's directory, fetched when it is on the hub.

    Raises:
        ValueError: It is none of this model's that can be trained, with the key of the recipe that names it.
    """
    directory = Path(path)
    if not directory.exists():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(path, allow_patterns=["adapter_*"]))
        if not (directory / CONFIG).exists():
            raise ValueError(
                f"{key}: {path} has no {CONFIG} at its top. Where its adapters are in folders, fetch it (hf download "
                f"{path} --local-dir DIR) and name one: {key}: DIR/NAME"
            )
    if problem := adapter_problem(directory, model):
        raise ValueError(f"{key}: {problem}")
    return directory


def _fill(model: PreTrainedModel, adapter: str, values: dict[str, torch.Tensor], directory: Path, key: str) -> None:
    """Copies a file's tensors into one of the model's adapters.

    Raises:
        ValueError: Names or shapes differ: it is an adapter of another model.
    """
    places = _in_file(model, adapter, {**_kept_buffers(model), **dict(model.named_parameters())})
    if strange := sorted(places.keys() ^ values.keys()):
        raise ValueError(f"{key}: {directory} is of another model: {strange[0]} is not in both")
    for name, place in places.items():
        if place.shape != values[name].shape:
            shapes = f"{list(values[name].shape)} there, {list(place.shape)} here"
            raise ValueError(f"{key}: {directory} is of another model: {name} has shape {shapes}")
        if isinstance(place, nn.Parameter) and not place.is_meta:
            place.data = values[name].to(device=place.device, dtype=torch.float32, copy=True)
        elif not place.is_meta:
            place.copy_(values[name])


def _short_names(targets: Iterable[str], model: nn.Module) -> list[str]:
    """The last parts of the names, where they mean the layers that have an adapter and no others.

    PEFT makes a list of whole names of all-linear; a deeper model has layers of these names as well, and others that
    would be left as they are.
    """
    ends = {name.rpartition(".")[2] for name in targets}
    names = {name: isinstance(module, BaseTunerLayer) and _is_trained(module) for name, module in model.named_modules()}
    mean_the_same = all(is_adapted == (name.rpartition(".")[2] in ends) for name, is_adapted in names.items())
    return sorted(ends if mean_the_same else targets)


def _kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a method keeps beside what it trains, such as where its weights are, but for what it can make again."""
    parameters = dict(model.named_parameters())
    kept = model.state_dict().items()
    return {name: buffer for name, buffer in kept if name not in parameters and not buffer.is_meta}


def _in_file(model: PreTrainedModel, adapter: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names that PEFT gives them in a file: those of one adapter, of all by their names in the model."""
    found = get_peft_model_state_dict(model, tensors, adapter, save_embedding_layers=False)
    return {f"base_model.model.{name}": tensor for name, tensor in found.items()}
