"""Random models of given shapes, recipes for them, and batches of random tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.rollout_engines.sent_weights import Chunks
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.batching import pack
from rlflow.recipe import Recipe, load_recipe
from rlflow.types import Denominators, MicroBatch, Sample

_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "qwen3",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    },
    # Those of Qwen2.5-0.5B and Qwen2.5-1.5B.
    "0.5B": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5B": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
"""Fields of a transformers config."""
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_config(shape: str, directory: Path) -> Path:
    """A model directory without weights."""
    config = AutoConfig.for_model(**SHAPES[shape], bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config.architectures = [ARCHITECTURES[config.model_type]]
    path = directory / shape
    config.save_pretrained(path)
    return path


def random_policy(directory: Path, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the config in ``directory`` with weights of ``dtype``, on the CPU."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(directory)
    # Its own loop over experts takes any dtype.
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def save_policy(directory: Path, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """``random_policy``, its weights written beside its config."""
    policy = random_policy(directory, seed, dtype)
    policy.save_pretrained(directory)
    return policy


def recipe_of(model_dir: Path, settings: Mapping[str, Any], algorithm: str = "sft") -> Recipe:
    """A recipe for one trainer on the GPU, or on the CPU where there is none."""
    recipe = {
        "algorithm": {"name": algorithm},
        "model": {"path": str(model_dir)},
        "data": {"train": {"generator": "arithmetic"}, "prompts_per_step": 8},
        "trainer": {"gpus_per_worker": 1.0 if torch.cuda.is_available() else 0.0},
        "run": {"steps": 1},
    }
    path = model_dir / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return load_recipe(path, settings)[0]


def random_batch(lengths: list[int], vocabulary: int, seed: int) -> MicroBatch:
    """Sequences packed into one micro-batch; the second half of each is trained, in the mean over its tokens."""
    rng = np.random.default_rng(seed)
    num_trained = sum(length - length // 2 for length in lengths)
    samples = []
    for length in lengths:
        trained = np.arange(length) >= length // 2
        token_ids = rng.integers(2, vocabulary, length).astype(np.int32)
        samples.append(Sample(token_ids, trained, (trained / num_trained).astype(np.float32)))
    ((batch,),) = pack(samples, max_tokens=sum(lengths), num_ranks=1)
    return batch


def denominators_of(batch: MicroBatch) -> Denominators:
    """Of an optimizer batch that is this micro-batch alone."""
    sequences = len(batch.cu_seqlens) - 1
    return Denominators(int(batch.loss_mask.sum()), sequences, sequences)


def make_trainer(recipe: Recipe) -> PolicyTrainer:
    """One rank that has loaded its model."""
    trainer = PolicyTrainer(recipe.model, recipe.trainer, rank=0, world_size=1, num_threads=4, seed=0)
    trainer.setup(None)
    return trainer


@torch.no_grad()
def plain_logprobs(policy: PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """Of every token but the first, float64, by the model's own forward pass on one sequence."""
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(policy.device)
    logprobs = torch.log_softmax(policy(ids[None]).logits[0, :-1].double(), dim=-1)
    return logprobs.gather(1, ids[1:, None]).squeeze(1).cpu().numpy()


def make_engine(name: str, directory: Path, dtype: str, log_path: Path, *, is_whole: bool = False) -> Any:
    """A rollout engine of its own, torch or vllm.

    Args:
        is_whole: The weights are those of the directory (vllm).
    """
    if name == "torch":
        from rlflow.actors.rollout_engines.torch_engine import TorchEngine

        return TorchEngine(str(directory), dtype=dtype, max_num_seqs=64)
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    return VllmEngine(
        str(directory),
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=64,
        seed=0,
        gpu_memory_fraction=0.2,
        kv_cache_gib=0.2,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=log_path,
        num_threads=2,
        is_whole=is_whole,
    )


def load(engine: Any, policy: PreTrainedModel, version: int) -> None:
    """Gives a policy's weights to an engine, as a trainer does: the first version at once, others in pieces."""
    snapshot = pack_weights(to_checkpoint(policy, policy.named_parameters()), version)
    weights = list(unpack_weights(snapshot))
    pieces = (weights[first : first + 5] for first in range(0, len(weights), 5))
    engine.load_weights(Chunks(pieces) if version else weights, version)
