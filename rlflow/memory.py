"""How much memory each actor will need, from the model's config alone: nothing is loaded.

An estimate of the largest things that are alive at once. Sums are exact for what is counted; allocator slack, sharding
buffers and the data are not.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlflow.recipe import AdapterBlock, ModelBlock, Recipe
from rlflow.recipe.adapter_files import read_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 1 << 29
"""Of an actor with torch and transformers or vLLM imported, before it holds anything (0.4 to 0.6 GiB)."""
REWARD_PROCESS_BYTES = 1 << 27
"""Of a process that only runs reward functions."""
HOST_PART = "offloaded"
"""What a GPU's rank keeps in the host's memory."""
LOGITS_ELEMENTS = 1 << 25
"""Trainer and reference score tokens in chunks of this many logits, in float32."""
_NF4_BYTES = 0.52
"""A weight in 4 bits and its doubly quantized scale (arXiv 2305.14314, section 3: 0.127 bits)."""

_TWO_MATRIX_MLP = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "falcon", "starcoder2"}
_UNTIED_UNLESS_SAID = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3"}
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
    adapter: int | None = None
    """Parameters that are trained instead of all of these; None where all are."""

    @property
    def activations_per_token(self) -> int:
        """Elements a layer keeps of each token for the backward pass: counted in a Llama layer of transformers."""
        return 6 * self.hidden + 2 * (self.query_width + self.key_width) + 4 * self.mlp_width

    @property
    def cache_per_token(self) -> int:
        """Elements of keys and values a token takes in all layers."""
        return 2 * self.layers * self.key_width


def read_shape(model: ModelBlock) -> ModelShape:
    """The shape of a model that is on this machine, or of a new one.

    Raises:
        UnknownShape: A hub id, or a config without the common fields.
    """
    if model.architecture is not None:
        size = len(set(model.characters or "")) + _SPECIAL_TOKENS
        return shape_of({"tie_word_embeddings": True, **model.architecture, "vocab_size": size})
    directory = Path(model.path or "")
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownShape(f"{model.path} has no config.json on this machine") from error
    return shape_of(config, count_stored(directory))


def shape_of(config: Mapping[str, Any], parameters: int | None = None) -> ModelShape:
    """From the fields of a transformers config, by the names that most architectures use.

    Args:
        parameters: How many there are, when that is known; otherwise the count of a Llama-like decoder, exact for
            llama, qwen2 and qwen3 and for mixtral, qwen2_moe and qwen3_moe.
    """
    if "text_config" in config and isinstance(config["text_config"], dict):
        config = config["text_config"]
    hidden = _count(config, "hidden_size", "n_embd", "d_model")
    heads = _count(config, "num_attention_heads", "n_head", "num_heads")
    head_size = _count(config, "head_dim", default=hidden // heads)
    mlp = _count(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    shape = ModelShape(
        parameters=parameters or 0,
        layers=_count(config, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        query_width=heads * head_size,
        key_width=_count(config, "num_key_value_heads", default=heads) * head_size,
        mlp_width=mlp * _count(config, "num_experts_per_tok", default=1),
        vocabulary=_count(config, "vocab_size"),
        max_positions=_count(config, "max_position_embeddings", "n_positions", default=0) or None,
    )
    if parameters is not None:
        return shape
    total = _attention_parameters(config, shape, head_size) * shape.layers + hidden
    total += _feed_forward_parameters(config, shape)
    kind = str(_first(config, "model_type", default=""))
    tied = _first(config, "tie_word_embeddings", default=kind not in _UNTIED_UNLESS_SAID)
    total += shape.vocabulary * hidden * (1 if tied else 2)
    total += _count(config, "n_positions", default=0) * hidden
    return replace(shape, parameters=total)


def _attention_parameters(config: Mapping[str, Any], shape: ModelShape, head_size: int) -> int:
    """Of a layer, with the norms before attention and feed-forward."""
    kind = str(_first(config, "model_type", default=""))
    queries, keys, hidden = shape.query_width, shape.key_width, shape.hidden
    count = 2 * hidden * queries + 2 * hidden * keys + 2 * hidden
    of_qwen2 = kind in ("qwen2", "qwen2_moe")
    if of_qwen2 or _first(config, "attention_bias", default=False):
        count += queries + 2 * keys + (0 if of_qwen2 else hidden)
    return count + 2 * head_size if kind.startswith("qwen3") else count


def _feed_forward_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Of all layers: a router and experts in the sparse ones, one wider expert in the others."""
    kind, hidden = str(_first(config, "model_type", default="")), shape.hidden
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
    return sum(math.prod(shape) for shape in stored_shapes(directory).values()) or None


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """Of every tensor in a directory's safetensors files, from their headers.

    https://huggingface.co/docs/safetensors: 8 bytes of length, then JSON with the shape of every tensor.

    Raises:
        UnknownShape: One of them is no safetensors file.
    """
    shapes = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        except (OSError, ValueError, struct.error) as error:
            raise UnknownShape(f"{path} is no safetensors file: {error}") from error
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def count_adapter(shape: ModelShape, adapter: AdapterBlock) -> int:
    """Parameters of an adapter on a Llama-like decoder: rank x (inputs + outputs) of each layer it is on.

    Raises:
        UnknownShape: It goes on from one that is not on this machine.
    """
    adapter = _described(adapter)
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
    """With the keys that the adapter at ``path`` settles."""
    if adapter.path is None:
        return adapter
    try:
        config = read_config(Path(adapter.path))
        targets = config["target_modules"]
        found = {"rank": config["r"], "kind": "dora" if config.get("use_dora") else "lora"}
    except (ValueError, KeyError) as error:
        raise UnknownShape(f"adapter {adapter.path} is not on this machine") from error
    if isinstance(targets, list):
        found["target_modules"] = targets
    return adapter.model_copy(update={**found, "path": None})


def trainer_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Of one rank of the trainer."""
    trainer, tokens = recipe.trainer, micro_batch_tokens(recipe)
    return {
        **_state_bytes(recipe, shape.parameters, trainer.workers, bool(trainer.gpus_per_worker), shape.adapter),
        "activations": _activation_bytes(recipe, shape),
        "logits": 3 * _logits_bytes(tokens, shape),
        "process": PROCESS_BYTES,
    }


def critic_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Of one rank of the critic: a trainer without logits."""
    critic = recipe.algorithm.critic
    return {
        **_state_bytes(recipe, shape.parameters, critic.workers, bool(critic.gpus_per_worker)),
        "activations": _activation_bytes(recipe, shape),
        "logits": 0,
        "process": PROCESS_BYTES,
    }


def _activation_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Of one micro-batch, kept for its backward pass."""
    layers_kept = 1 if recipe.trainer.gradient_checkpointing else shape.layers
    kept = layers_kept * shape.activations_per_token + (shape.layers - layers_kept) * shape.hidden
    return micro_batch_tokens(recipe) * kept * DTYPE_BYTES[recipe.model.dtype] // recipe.trainer.sequence_parallel


def _state_bytes(
    recipe: Recipe, parameters: int, ranks: int, on_gpu: bool, adapter: int | None = None
) -> dict[str, int]:
    """Weights, gradients and Adam's moments of one rank, as the engine shards them; those of an adapter are float32.

    What it offloads from a GPU is one sum, HOST_PART; on a CPU there is nowhere to offload to.
    """
    trainer, size = recipe.trainer, DTYPE_BYTES[recipe.model.dtype]
    trained, trained_size = (parameters, size) if adapter is None else (adapter, 4)
    held = weight_bytes(recipe, parameters, adapter)
    if trainer.engine == "deepspeed":
        stage, offload = trainer.deepspeed.stage, trainer.deepspeed.offload
        share = math.ceil(trained / ranks)
        parts = {
            "weights": math.ceil(held / ranks) if stage == 3 else held,
            "gradients": (trained if stage == 1 else share) * 4,
            # ZeRO steps on a copy of the weights in float32.
            "Adam": 3 * share * 4,
        }
        away = {"none": (), "optimizer": ("gradients", "Adam"), "all": tuple(parts)}[offload]
    else:
        shards = max(1, ranks // trainer.fsdp.replicas)
        share = math.ceil(trained / shards)
        moment = 1 if trainer.optimizer.kind == "adamw_8bit" else trained_size
        parts = {
            "weights": math.ceil(held / shards),
            "gradients": share * trained_size,
            "Adam": 2 * share * moment,
        }
        away = tuple(parts) if trainer.fsdp.offload else ()
    if not (on_gpu and away):
        return parts
    kept = {name: count for name, count in parts.items() if name not in away}
    return {**kept, HOST_PART: sum(parts[name] for name in away)}


def weight_bytes(recipe: Recipe, parameters: int, adapter: int | None) -> int:
    """Of a model with its adapter, and with the one it goes on from."""
    block = recipe.model.adapter
    if block is None or adapter is None:
        return parameters * DTYPE_BYTES[recipe.model.dtype]
    base = _NF4_BYTES if block.quantize == "nf4" else DTYPE_BYTES[recipe.model.dtype]
    return int(parameters * base) + adapter * 4 * (1 if block.path is None else 2)


def reference_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Of one ReferenceModel: it keeps nothing for a backward pass."""
    tokens, size = micro_batch_tokens(recipe), DTYPE_BYTES[recipe.model.dtype]
    return {
        "weights": shape.parameters * size,
        "activations": tokens * shape.activations_per_token * size,
        "logits": 2 * _logits_bytes(tokens, shape),
        "process": PROCESS_BYTES,
    }


def rollout_bytes(recipe: Recipe, shape: ModelShape, engine: str) -> dict[str, int]:
    """Of one RolloutWorker. The key-value cache is vLLM's fixed one, or what the longest completions would fill."""
    rollout, size = recipe.rollout, DTYPE_BYTES[recipe.model.dtype]
    sequences = rollout.max_num_seqs
    if recipe.family == "online":
        share = math.ceil(recipe.data.prompts_per_step / rollout.workers) * recipe.algorithm.group_size
        sequences = min(sequences, share)
    length = recipe.data.max_prompt_tokens + rollout.max_new_tokens
    cache = sequences * length * shape.cache_per_token * size
    if engine == "vllm" and not rollout.gpus_per_worker:
        cache = int(rollout.kv_cache_gib * 2**30)
    return {
        "weights": weight_bytes(recipe, shape.parameters, shape.adapter),
        "KV cache": cache,
        "logits": 2 * sequences * shape.vocabulary * 4,
        "process": PROCESS_BYTES,
    }


def micro_batch_tokens(recipe: Recipe) -> int:
    """Most tokens in one forward pass of a rank: the packing budget, one longer sequence, or all there is."""
    longest = longest_sequence(recipe)
    per_rank = math.ceil(sequences_per_step(recipe) / recipe.trainer.data_parallel) * longest
    return max(longest, min(recipe.trainer.tokens_per_micro_batch, per_rank))


def longest_sequence(recipe: Recipe) -> int:
    """Tokens of the longest sequence that is trained."""
    if recipe.family == "online":
        return recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    return recipe.data.max_tokens


def sequences_per_step(recipe: Recipe) -> int:
    """Rollouts, examples, or both answers of every pair."""
    if recipe.family == "online":
        return recipe.data.prompts_per_step * recipe.algorithm.group_size
    return recipe.data.prompts_per_step * (2 if recipe.is_paired else 1)


def _logits_bytes(tokens: int, shape: ModelShape) -> int:
    return 4 * min(tokens * shape.vocabulary, max(LOGITS_ELEMENTS, shape.vocabulary))


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
