"""In which form rollout workers get the policy's weights (whole, of an adapter alone, or of both as one), and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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


class WeightTransport(NamedTuple):
    """How new weights get from the trainer to the rollout workers."""

    name: str
    """objects, ipc or collective."""
    reason: str
    """Of that choice."""


def weight_transport(recipe: Recipe) -> WeightTransport:
    """The transport that the recipe names, or the object store: what else would fit has not run on a GPU yet."""
    rollout, wanted = recipe.rollout, recipe.rollout.at_update.transport
    if wanted != "auto":
        return WeightTransport(wanted, "rollout.at_update.transport")
    if rollout_engine(recipe) == "http":
        return WeightTransport("objects", "servers read files")
    if recipe.model.adapter is not None and not sends_merged(recipe):
        return WeightTransport("objects", "the adapter alone is small")
    if not (recipe.trainer.gpus_per_worker and rollout.gpus_per_worker):
        return WeightTransport("objects", "trainer and workers are not both on GPUs")
    if rollout.tensor_parallel_size > 1:
        return WeightTransport("objects", "an engine of several GPUs takes them from its worker's process")
    if rollout.at_update.running == "wait":
        return WeightTransport("objects", "the trainer does not wait for completions under way")
    if recipe.trainer.gpus_per_worker + rollout.gpus_per_worker <= 1:
        near, why = "ipc", "trainer and worker share a GPU"
    elif min(recipe.trainer.gpus_per_worker, rollout.gpus_per_worker) >= 1:
        near, why = "collective", "trainer and workers have GPUs of their own"
    else:
        return WeightTransport("objects", "workers have shares of other GPUs")
    return WeightTransport("objects", f"{why}: {near} would fit, and has not run on a GPU yet")


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
