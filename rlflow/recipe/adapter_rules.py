"""What an adapter rules out in the other blocks of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlflow.recipe.block import Conflict
from rlflow.recipe.model_blocks import QUANTIZED_BASES
from rlflow.recipe.peft_methods import (
    METHODS,
    drops_out,
    has_lora_modules,
    method_of,
    peft_problems,
    starts_elsewhere,
)

if TYPE_CHECKING:
    from rlflow.recipe.model_blocks import AdapterBlock
    from rlflow.recipe.schema import Recipe


def adapter_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with ``model.adapter``."""
    adapter, trainer, rollout, name = recipe.model.adapter, recipe.trainer, recipe.rollout, recipe.algorithm.name
    if adapter is None:
        return
    if recipe.model.architecture is not None:
        yield Conflict(("model.adapter", "model.architecture"), "has nothing to adapt in a new model: remove it")
    if recipe.algorithm.learning.head != "token":
        yield from _head_conflicts(recipe, adapter)
    elif adapter.drops_out and recipe.family not in ("sft", "sample"):
        reason = f"{name} compares logprobs, and with dropout those of a policy differ from its own: set 0"
        key = "dropout" if adapter.peft is None else f"peft.{drops_out(adapter.peft)}"
        yield Conflict((f"model.adapter.{key}", "algorithm.name"), reason)
    if adapter.lora_plus_ratio is not None and trainer.optimizer.kind in ("muon", "function"):
        reason = "is a ratio of AdamW's learning rates: set trainer.optimizer.kind: adamw, or remove it"
        yield Conflict(("model.adapter.lora_plus_ratio", "trainer.optimizer.kind"), reason)
    if adapter.peft is not None and not any(peft_problems(adapter.peft)):
        yield from _method_conflicts(recipe, adapter.peft)
    if adapter.quantize == "none":
        return
    needs_gpu = QUANTIZED_BASES[adapter.quantize].needs_gpu
    if (needs_gpu and not trainer.gpus_per_worker) or trainer.engine != "fsdp" or trainer.fsdp.offload:
        on = "trainer.gpus_per_worker: 1 and " if needs_gpu else ""
        reason = f"is trained with engine fsdp{', on GPUs' if needs_gpu else ''}, without offload: set {on}"
        yield Conflict(
            ("model.adapter.quantize", "trainer.gpus_per_worker"), f"{reason}trainer.engine: fsdp, or quantize: none"
        )
    elif trainer.fsdp.mixed_precision:
        reason = "keeps its weights as they are: set mixed_precision: false and model.dtype: bfloat16"
        yield Conflict(("trainer.fsdp.mixed_precision", "model.adapter.quantize"), reason)
    if recipe.needs_rollouts and (rollout.engine != "torch" or (needs_gpu and not rollout.gpus_per_worker)):
        on = " and rollout.gpus_per_worker: 1" if needs_gpu else ""
        reason = f"generates with the base in few bits too: set rollout.engine: torch{on}"
        yield Conflict(("model.adapter.quantize", "rollout.engine"), reason)


def _method_conflicts(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Conflict]:
    """What one of PEFT's methods rules out beside LoRA on its modules."""
    adapter, trainer, method = recipe.model.adapter, recipe.trainer, method_of(config)
    assert adapter is not None
    if recipe.family not in ("sft", "sample") and (how := starts_elsewhere(config)):
        reason = f"{how}, which {recipe.algorithm.name} has for a reference: remove the field"
        yield Conflict((f"model.adapter.peft.{next(iter(METHODS[method].start))}", "algorithm.name"), reason)
    if recipe.model.dtype != "float32" and not METHODS[method].in_16_bits:
        reason = f"PEFT computes {method} in the dtype of its own weights, float32: set model.dtype: float32"
        yield Conflict(("model.adapter.peft", "model.dtype"), reason)
    if adapter.subtracts_start and adapter.quantize != "none":
        reason = "starts from the weights themselves, not from those in 4 bits: set quantize: none"
        yield Conflict(("model.adapter.peft.init_lora_weights", "model.adapter.quantize"), reason)
    if METHODS[method].gives_out_ranks:
        yield from _rank_conflicts(recipe, config)
    if has_lora_modules(config):
        return
    if trainer.engine == "deepspeed":
        reason = f"{method} is not tried with deepspeed: set trainer.engine: fsdp, or train LORA"
        yield Conflict(("model.adapter.peft", "trainer.engine"), reason)
    if trainer.workers > 1 and METHODS[method].gives_out_ranks:
        reason = f"{method} compares values over all layers, which ranks share out: set 1, or train LORA"
        yield Conflict(("trainer.workers", "model.adapter.peft"), reason)
    if trainer.fsdp.mixed_precision:
        reason = f"{method} would be merged in 16 bits: set mixed_precision: false"
        yield Conflict(("trainer.fsdp.mixed_precision", "model.adapter.peft"), reason)
    if adapter.quantize != "none":
        reason = f"is for LoRA and DoRA, and peft has {method}: set quantize: none, or train LORA"
        yield Conflict(("model.adapter.quantize", "model.adapter.peft"), reason)


def _rank_conflicts(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Conflict]:
    """What ranks that change in every update rule out."""
    if recipe.trainer.fsdp.offload:
        reason = "gives out the ranks of whole tensors: set offload: false"
        yield Conflict(("trainer.fsdp.offload", "model.adapter.peft"), reason)
    kept = config.get("tinit", 0) + config.get("tfinal", 0)
    steps, warmup = recipe.run.steps, 0 if recipe.critic is None else recipe.critic.warmup_steps
    if steps is not None and kept >= (updates := (steps - warmup) * recipe.algorithm.num_updates):
        reason = f"tinit and tfinal are {kept} updates of {updates}, and ranks are given out in between: lower them"
        yield Conflict(("model.adapter.peft", "run.steps"), reason)


def _head_conflicts(recipe: Recipe, adapter: AdapterBlock) -> Iterator[Conflict]:
    """Beside a head: of a classifier, a reranker, an embedding or a reward model."""
    name = recipe.algorithm.name
    if adapter.peft is not None:
        yield Conflict(("model.adapter.peft", "algorithm.name"), f"{name} takes LoRA and DoRA alone: remove peft")
    if adapter.dropout:
        reason = f"{name} may compute a text twice a step, and with dropout it would be two: set 0"
        yield Conflict(("model.adapter.dropout", "algorithm.name"), reason)
    if adapter.path is not None:
        yield Conflict(("model.adapter.path", "algorithm.name"), f"{name} begins a new adapter: remove path")
    if adapter.quantize != "none":
        yield Conflict(("model.adapter.quantize", "algorithm.name"), f"is of policies, not of {name}: set none")
