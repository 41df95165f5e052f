"""What an adapter rules out in the other blocks of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlflow.recipe.block import Conflict

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


def adapter_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with ``model.adapter``."""
    adapter, trainer, rollout, name = recipe.model.adapter, recipe.trainer, recipe.rollout, recipe.algorithm.name
    if adapter is None:
        return
    if recipe.model.architecture is not None:
        yield Conflict(("model.adapter", "model.architecture"), "has nothing to adapt in a new model: remove it")
    if recipe.algorithm.learning.head != "token":
        reason = f"is of a policy; {name} trains a model whole: remove adapter"
        yield Conflict(("model.adapter", "algorithm.name"), reason)
    if adapter.dropout and recipe.family != "sft":
        reason = f"{name} compares logprobs, and with dropout those of a policy differ from its own: set 0"
        yield Conflict(("model.adapter.dropout", "algorithm.name"), reason)
    if adapter.lora_plus_ratio is not None and trainer.optimizer.kind in ("muon", "function"):
        reason = "is a ratio of AdamW's learning rates: set trainer.optimizer.kind: adamw, or remove it"
        yield Conflict(("model.adapter.lora_plus_ratio", "trainer.optimizer.kind"), reason)
    on_vllm = rollout.engine == "vllm" or (rollout.engine == "auto" and rollout.gpus_per_worker > 0)
    if recipe.needs_rollouts and on_vllm and adapter.kind == "dora":
        reason = "vLLM does not generate with DoRA: set rollout.engine: torch, or kind: lora"
        yield Conflict(("model.adapter.kind", "rollout.engine"), reason)
    if adapter.quantize == "none":
        return
    one_rank = trainer.workers == 1 and not (trainer.fsdp.offload or trainer.fsdp.mixed_precision)
    if not (trainer.gpus_per_worker and trainer.engine == "fsdp" and one_rank):
        reason = "needs a GPU, one rank and engine fsdp as it is: set trainer.gpus_per_worker: 1, or quantize: none"
        yield Conflict(("model.adapter.quantize", "trainer.gpus_per_worker"), reason)
    if recipe.needs_rollouts and (rollout.engine != "torch" or not rollout.gpus_per_worker):
        reason = "generates with the base in 4 bits too: set rollout.engine: torch and rollout.gpus_per_worker: 1"
        yield Conflict(("model.adapter.quantize", "rollout.engine"), reason)
