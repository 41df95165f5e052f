"""Mixtures of experts in vLLM: of which it can take new weights any number of times, and what is done after each.

vLLM may rearrange experts for its kernels once they are loaded, and later loads write into what it made of them. On
GPUs its Triton kernels take them as they were loaded. On a CPU they are packed in place, so each load packs them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ARCHITECTURES = (
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Whose logprobs were compared with transformers' after several weight syncs, on CPUs."""
_THROUGH_TRANSFORMERS = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
_ON_CPUS_ALONE = ("GptOssForCausalLM",)
"""Their experts have another kernel on GPUs than the Triton ones."""
_CPU_BLOCK = 32
"""vLLM's CPU kernels want multiples of it, and other experts are widened once they are loaded."""


def expert_options(model: ModelConfig, *, on_cpu: bool, with_adapter: bool) -> dict[str, Any]:
    """What EngineArgs needs for a model, nothing for one without experts.

    Raises:
        ValueError: vLLM could not take new weights for it.
    """
    if model.use_mla:
        raise ValueError(
            "it has latent attention, whose weights vLLM rearranges once they are loaded, so that it cannot take new "
            "ones; set rollout.engine: torch"
        )
    if not model.is_moe:
        return {}
    # What vLLM runs through transformers has another name there.
    is_own = model.architecture not in _THROUGH_TRANSFORMERS
    name = model.architecture if is_own else model.architectures[0]
    if name not in ARCHITECTURES or with_adapter or (name in _ON_CPUS_ALONE and not on_cpu):
        what = "an adapter of a mixture of experts" if with_adapter else f"new weights of {name}'s experts"
        raise ValueError(f"{what} cannot be handed to it yet; set rollout.engine: torch")
    if not on_cpu:
        return {"moe_backend": "triton"}
    config = model.hf_text_config
    of_experts = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    for field in ("hidden_size", of_experts):
        size = getattr(config, field)
        if size % _CPU_BLOCK:
            raise ValueError(
                f"its {field} is {size}, and on a CPU it must be a multiple of {_CPU_BLOCK}; set rollout.engine: torch"
            )
    return {}


def pack_experts(model: Any) -> None:
    """Runs in every worker after each load: puts experts as loaded into the order of vLLM's CPU kernels, in place."""
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layers: list[Any] = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    for layer in layers:
        kernel = layer.quant_method.moe_kernel.fused_experts
        if isinstance(kernel, CPUUnquantizedExperts) and not kernel._use_zentorch:
            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data.copy_(cpu_prepack_moe_weight(weight.data, kernel.isa))
