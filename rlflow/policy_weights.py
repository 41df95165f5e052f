"""In which form rollout workers get the policy's weights: whole, of an adapter alone, or of both as one."""

from __future__ import annotations

from rlflow.recipe import Recipe
from rlflow.recipe.adapter_files import config_of_adapter
from rlflow.recipe.peft_methods import has_lora_modules, is_plain_lora
from rlflow.roles import rollout_engine


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
    return not (is_plain_lora(config) if engine == "vllm" else has_lora_modules(config))
