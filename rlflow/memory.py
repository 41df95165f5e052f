"""A model's shape from its config alone, and what its weights, gradients and moments take: nothing is loaded.

What actors need in all, activations included, is in rlflow.actor_memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlflow.recipe import AdapterBlock, ModelBlock, Recipe
from rlflow.recipe.adapter_files import read_config
from rlflow.recipe.expand_block import ExpandBlock
from rlflow.recipe.hub_files import hub_config
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.model_blocks import QUANTIZED_BASES, Part
from rlflow.recipe.model_files import read_fields, read_header
from rlflow.recipe.stored_formats import stored_format
from rlflow.tower_shape import TowerShape, tower_shape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HOST_PART = "offloaded"
"""What a GPU's rank keeps in the host's memory."""

_TWO_MATRIX_MLP = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "falcon", "starcoder2"}
_UNTIED_UNLESS_SAID = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3"}
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GATED_ONLY = ("k_proj", "v_proj", "gate_proj")
"""What models of two matrices have not: their queries, keys and values are one layer."""
_SPECIAL_TOKENS = 2
"""Pad and eos, of the tokenizer made from `model.characters`."""


class UnknownShape(ValueError):
    """The memory of this model cannot be estimated here; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    layers: int
    hidden: int
    query_width: int
    """Heads times their size."""
    key_width: int
    """Key-value heads times their size."""
    mlp_width: int
    """Of what one token passes through: all of its experts."""
    vocabulary: int
    max_positions: int | None
    heads: int
    """Of queries."""
    kind: str
    """`model_type` of the config."""
    activation: str
    """Of the MLP."""
    is_tied: bool
    """The head is the embeddings."""
    has_experts: bool = False
    """Some layers are mixtures of experts."""
    adapter: int | None = None
    """Parameters that are trained instead of all of these; None where all are."""
    adapter_rank: int = 0
    adapter_targets: tuple[str, ...] = ()
    """Last parts of the names of a layer's modules that have an adapter."""
    frozen: int = 0
    """Parameters of these that stay as they are, where there is no adapter."""
    tower: TowerShape | None = None
    """What reads pictures, counted in ``parameters``; None of a model that reads text alone."""

    @property
    def is_gated(self) -> bool:
        """The MLP has gate, up and down, and norms are RMSNorm; otherwise up and down, and LayerNorm."""
        return self.kind not in _TWO_MATRIX_MLP

    @property
    def has_qk_norms(self) -> bool:
        """Queries and keys are normalized before they are rotated."""
        return self.kind.startswith("qwen3")

    @property
    def head_parameters(self) -> int:
        """Of the matrix that makes logits."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer: what is neither embeddings nor head."""
        of_tower = 0 if self.tower is None else self.tower.parameters
        return (self.parameters - of_tower - (1 if self.is_tied else 2) * self.head_parameters) // self.layers

    @property
    def attention_cost(self) -> float:
        """What a token costs more for each token of its sequence, in costs of a token alone.

        Of L tokens one attends to L / 2: multiplying by keys and by values is 2 L operations for each number of its
        queries, beside 2 for each weight that it passes through (arXiv 2001.08361, section 2.1, without causality).
        """
        attention = 2 * self.hidden * (self.query_width + self.key_width)
        mlp = (3 if self.is_gated else 2) * self.hidden * self.mlp_width
        return self.layers * self.query_width / (self.layers * (attention + mlp) + self.head_parameters)

    @property
    def cache_per_token(self) -> int:
        """Elements of keys and values a token takes in all layers."""
        return 2 * self.layers * self.key_width


def read_shape(model: ModelBlock) -> ModelShape:
    """The shape of a model that is on this machine, or on the hub, or of a new one.

    Raises:
        UnknownShape: Its config is not to be had, or has not the common fields.
    """
    config = read_model_config(model)
    if model.architecture is not None:
        return shape_of(config)
    assert model.path is not None
    # Tensors in few bits are packed, with scales beside them.
    return shape_of(config, None if stored_format(config) else stored_shapes(Path(model.path)))


def read_model_config(model: ModelBlock) -> Mapping[str, Any]:
    """Fields of a model's config, or of a new one's.

    Raises:
        UnknownShape: They are not to be had.
    """
    if model.architecture is not None:
        size = len(set(model.characters or "")) + _SPECIAL_TOKENS
        return {"tie_word_embeddings": True, **model.architecture, "vocab_size": size}
    assert model.path is not None
    directory = Path(model.path)
    try:
        if not directory.exists() and is_hub_id(model.path):
            return hub_config(model.path, model.revision)
        return read_fields(directory / "config.json")
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnknownShape(f"cannot read config.json of {model.path}: {' '.join(lines[:2])}") from error


def shape_of(config: Mapping[str, Any], stored: Mapping[str, Sequence[int]] | None = None) -> ModelShape:
    """From the fields of a transformers config, by the names that most architectures use.

    Args:
        stored: Shapes of the tensors in its files, where they are here; otherwise the count of a Llama-like decoder,
            exact for llama, qwen2 and qwen3 and for mixtral, qwen2_moe and qwen3_moe.
    """
    tower, parameters = tower_shape(config, stored or {}), sum(map(math.prod, (stored or {}).values())) or None
    if "text_config" in config and isinstance(config["text_config"], dict):
        # Whether the head is the embeddings is said of the whole model.
        tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
        config = config["text_config"] | tied
    hidden = _count(config, "hidden_size", "n_embd", "d_model")
    heads = _count(config, "num_attention_heads", "n_head", "num_heads")
    head_size = _count(config, "head_dim", default=hidden // heads)
    mlp = _count(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    kind = str(_first(config, "model_type", default=""))
    activation = "gelu_new" if kind in ("gpt2", "gpt_neo", "gptj") else "silu"
    shape = ModelShape(
        parameters=parameters or 0,
        layers=_count(config, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        query_width=heads * head_size,
        key_width=_count(config, "num_key_value_heads", default=heads) * head_size,
        mlp_width=mlp * _count(config, "num_experts_per_tok", default=1),
        vocabulary=_count(config, "vocab_size"),
        max_positions=_count(config, "max_position_embeddings", "n_positions", default=0) or None,
        heads=heads,
        kind=kind,
        activation=str(_first(config, "hidden_act", "activation_function", default=activation)),
        is_tied=bool(_first(config, "tie_word_embeddings", default=kind not in _UNTIED_UNLESS_SAID)),
        has_experts=_count(config, "num_experts", "num_local_experts", default=1) > 1,
        tower=tower,
    )
    if parameters is not None:
        return shape
    total = _attention_parameters(config, shape, head_size) * shape.layers + hidden
    total += _feed_forward_parameters(config, shape)
    total += shape.head_parameters * (1 if shape.is_tied else 2)
    total += _count(config, "n_positions", default=0) * hidden
    total += 0 if tower is None else tower.parameters
    return replace(shape, parameters=total)


def _attention_parameters(config: Mapping[str, Any], shape: ModelShape, head_size: int) -> int:
    """Of a layer, with the norms before attention and feed-forward."""
    kind = shape.kind
    queries, keys, hidden = shape.query_width, shape.key_width, shape.hidden
    count = 2 * hidden * queries + 2 * hidden * keys + 2 * hidden
    of_qwen2 = kind in ("qwen2", "qwen2_moe")
    if of_qwen2 or _first(config, "attention_bias", default=False):
        count += queries + 2 * keys + (0 if of_qwen2 else hidden)
    return count + 2 * head_size if kind.startswith("qwen3") else count


def _feed_forward_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Of all layers: a router and experts in the sparse ones, one wider expert in the others."""
    kind, hidden = shape.kind, shape.hidden
    matrices = 2 if kind in _TWO_MATRIX_MLP else 3
    wide = _count(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    dense = matrices * hidden * wide
    if _first(config, "mlp_bias", default=False):
        dense += (matrices - 1) * wide + hidden
    experts = _count(config, "num_experts", "num_local_experts", default=None if kind.endswith("_moe") else 1)
    if experts == 1:
        return shape.layers * dense
    one = matrices * hidden * _count(config, "moe_intermediate_size", default=wide)
    shared = _count(config, "shared_expert_intermediate_size", default=0)
    sparse = experts * (one + hidden) + (matrices * hidden * shared + hidden if shared else 0)
    step = _count(config, "decoder_sparse_step", default=1)
    dense_layers = set(_first(config, "mlp_only_layers", default=())) | {
        i for i in range(shape.layers) if (i + 1) % step
    }
    return len(dense_layers) * dense + (shape.layers - len(dense_layers)) * sparse


def count_stored(directory: Path) -> int | None:
    """Parameters in a directory's safetensors files, from their headers; None when there are none."""
    return sum(map(math.prod, stored_shapes(directory).values())) or None


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """Of every tensor in a directory's safetensors files, from their headers.

    Raises:
        UnknownShape: One of them is no safetensors file.
    """
    shapes = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            tensors, _ = read_header(path)
        except ValueError as error:
            raise UnknownShape(str(error)) from error
        shapes |= {name: tensor["shape"] for name, tensor in tensors.items()}
    return shapes


def with_trained_parts(shape: ModelShape, parts: Sequence[Part]) -> ModelShape:
    """Of a vision-language model of which these parts are trained, and the others stay as they are."""
    if shape.tower is None:
        return shape
    language = 0 if "language" in parts else shape.parameters - shape.tower.parameters
    return replace(shape, frozen=shape.tower.frozen(parts) + language)


def with_new_layers(shape: ModelShape, expand: ExpandBlock | None) -> ModelShape:
    """Of the model that new layers are put into, which then stays as it is."""
    if expand is None:
        return shape
    parameters = shape.parameters + expand.new_layers * shape.layer_parameters
    return replace(shape, layers=shape.layers + expand.new_layers, parameters=parameters, frozen=shape.parameters)


def with_adapter(shape: ModelShape, adapter: AdapterBlock, parts: Sequence[Part] = ("language",)) -> ModelShape:
    """
    Args:
        parts: That have an adapter; those beside the language model on all their linear layers.

    Raises:
        UnknownShape: It goes on from one that is not on this machine.
    """
    adapter = _described(adapter)
    targets = adapter.target_modules
    every = _LINEAR if shape.is_gated else tuple(name for name in _LINEAR if name not in _GATED_ONLY)
    names = every if targets == "all-linear" else tuple(target.rpartition(".")[2] for target in targets)
    count = _count_adapter(shape, adapter) if "language" in parts else 0
    if shape.tower is not None and targets == "all-linear":
        of_tower = dict.fromkeys(("vision", "audio"), shape.tower.vision_sides)
        sides = of_tower | {"projector": shape.tower.projector_sides}
        count += adapter.rank * sum(sides.get(part, 0) for part in parts)
    return replace(shape, adapter=count, adapter_rank=adapter.rank, adapter_targets=names)


def _count_adapter(shape: ModelShape, adapter: AdapterBlock) -> int:
    """Parameters on a Llama-like decoder: rank x (inputs + outputs) of each linear layer it is on."""
    hidden, queries, keys, mlp = shape.hidden, shape.query_width, shape.key_width, shape.mlp_width
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }
    targets = adapter.target_modules
    chosen = list(sizes.values()) if targets == "all-linear" else []
    chosen += [sizes.get(target.rpartition(".")[2], (hidden, hidden)) for target in targets if not chosen]
    lengths = sum(outputs for _, outputs in chosen) if adapter.kind == "dora" else 0
    return shape.layers * (adapter.rank * sum(map(sum, chosen)) + lengths)


def _described(adapter: AdapterBlock) -> AdapterBlock:
    """With the keys that the adapter at ``path`` settles; of PEFT's other methods, a LoRA of nearly as many weights."""
    if adapter.path is None and adapter.peft is None:
        return adapter
    try:
        config = adapter.config if adapter.path is None else read_config(Path(adapter.path))
    except ValueError as error:
        raise UnknownShape(f"adapter {adapter.path} is not on this machine") from error
    # Of methods without a rank, which train less, that of a small LoRA.
    found: dict[str, Any] = {"rank": config.get("r") or 8, "kind": "dora" if config.get("use_dora") else "lora"}
    targets = config.get("target_modules")
    if isinstance(targets, list) and targets:
        found["target_modules"] = targets
    return adapter.model_copy(update={**found, "path": None, "peft": None})


def state_bytes(recipe: Recipe, shape: ModelShape, ranks: int, on_gpu: bool) -> dict[str, int]:
    """Weights, gradients and Adam's moments of one rank, as the engine shards them. What is trained is float32.

    What it offloads from a GPU is one sum, HOST_PART; on a CPU there is nowhere to offload to.
    """
    trainer = recipe.trainer
    trained = shape.parameters - shape.frozen if shape.adapter is None else shape.adapter
    held = weight_bytes(recipe, shape.parameters, shape.adapter)
    if trainer.engine == "deepspeed":
        stage, offload = trainer.deepspeed.stage, trainer.deepspeed.offload
        share = math.ceil(trained / ranks)
        parts = {
            "weights": math.ceil(held / ranks) if stage == 3 else held,
            "gradients": (trained if stage == 1 else share) * 4,
            # ZeRO steps on a copy of the weights in float32.
            "optimizer": 3 * share * 4,
        }
        away = {"none": (), "optimizer": ("gradients", "optimizer"), "all": tuple(parts)}[offload]
    else:
        if shape.adapter is None:
            held = shape.parameters * 4
        shards = max(1, ranks // trainer.fsdp.replicas)
        share = math.ceil(trained / shards)
        moment = 1 if trainer.optimizer.kind == "adamw_8bit" else 4
        by_muon = _muon_parameters(shape) if trainer.optimizer.kind == "muon" else 0
        parts = {
            "weights": math.ceil(held / shards),
            "gradients": share * 4,
            "optimizer": (2 * share - by_muon // shards) * moment,
        }
        away = tuple(parts) if trainer.fsdp.offload else ()
    if not (on_gpu and away):
        return parts
    kept = {name: count for name, count in parts.items() if name not in away}
    return {**kept, HOST_PART: sum(parts[name] for name in away)}


def computed_bytes(recipe: Recipe) -> int:
    """Of an element of what trainers compute: of activations, and of weights that are whole for a moment."""
    return DTYPE_BYTES["bfloat16" if recipe.trainer.fsdp.mixed_precision else recipe.model.dtype]


def is_mixed(recipe: Recipe, shape: ModelShape) -> bool:
    """Whether FSDP2 keeps weights in float32 and computes in bfloat16, as of any bfloat16 model trained whole."""
    trainer = recipe.trainer
    is_half = recipe.model.dtype == "bfloat16" and shape.adapter is None
    return trainer.engine == "fsdp" and (trainer.fsdp.mixed_precision or is_half)


def _muon_parameters(shape: ModelShape) -> int:
    """With one moment: matrices of layers or of an adapter. Experts, of three dimensions, are left to AdamW."""
    if shape.adapter is not None:
        return shape.adapter
    return 0 if shape.has_experts else min(shape.layers * shape.layer_parameters, shape.parameters - shape.frozen)


def weight_bytes(recipe: Recipe, parameters: int, adapter: int | None) -> int:
    """Of a model with its adapter, and with the one that it is compared with."""
    block = recipe.model.adapter
    if block is None or adapter is None:
        return parameters * DTYPE_BYTES[recipe.model.dtype]
    is_whole = block.quantize == "none"
    base = DTYPE_BYTES[recipe.model.dtype] if is_whole else QUANTIZED_BASES[block.quantize].bytes
    is_kept = recipe.held_reference(recipe.model) is not None or block.subtracts_start
    return int(parameters * base) + adapter * 4 * (2 if is_kept else 1)


def _count(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these fields that the config has, a whole number."""
    value = _first(config, *names, default=default)
    if not isinstance(value, int) or (value < 1 and value != default):
        raise UnknownShape(f"its config gives {value} for {names[0]}, not a number")
    return value


def _first(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these fields that the config has."""
    for name in names:
        if name in config and config[name] is not None:
            return config[name]
    if default is None:
        raise UnknownShape(f"its config has no {names[0]}")
    return default
