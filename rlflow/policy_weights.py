"""In which form rollout workers get the policy's weights: whole, of an adapter alone, or of both as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlflow.memory import UnknownShape, read_model_config
from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.adapter_files import config_of_adapter
from rlflow.recipe.architectures import has_experts
from rlflow.recipe.peft_methods import has_lora_modules, is_plain_lora
from rlflow.roles import rollout_engine

_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")


def sends_merged(recipe: Recipe) -> bool:
    """Whether engines get what an adapter makes of the model's weights, whole, and not the adapter.

    vLLM takes LoRA alone, the torch engine DoRA as well, servers nothing but whole weights.
    """
    adapter, engine = recipe.model.adapter, rollout_engine(recipe)
    if not recipe.needs_rollouts or adapter is None or adapter.quantize != "none":
        return False
    if adapter.subtracts_start:
        return True
    config = config_of_adapter(adapter)
    if config is None or engine == "http":
        return engine == "http"
    if engine == "vllm":
        return not is_plain_lora(config) or (_names_experts(config) and _has_experts(recipe.model))
    return not has_lora_modules(config)


def _names_experts(config: Mapping[str, Any]) -> bool:
    """Whether a LoRA's layers may be experts and routers, which PEFT takes to be meant by the names that they had."""
    targets = config.get("target_modules")
    return isinstance(targets, str) or any(str(target).rpartition(".")[2] in _OF_EXPERTS for target in targets or ())


def _has_experts(model: ModelBlock) -> bool:
    """Whether it is known to have some."""
    try:
        return has_experts(read_model_config(model))
    except UnknownShape:
        return False
