"""The parts, in the order in which they run: what is right first, then what learns, then what is fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    summary: str
    function: str
    """``module:function`` of this directory; called with a Record and the arguments."""
    seconds: float
    """About how long it takes on one H100; its deadline is three times that, at least 90 s."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_gpu: bool = True
    packages: tuple[str, ...] = ()
    """Beside torch and transformers."""


def _engine(name: str, dtype: str, seconds: float, *, needs_gpu: bool) -> Part:
    return Part(
        f"{name}_{dtype}",
        f"logprobs of the {name} engine in {dtype} against transformers, before and after a weight sync",
        "correctness:engine_logprobs",
        seconds,
        {"name": name, "dtype": dtype},
        needs_gpu=needs_gpu,
        packages=("vllm",) if name == "vllm" else (),
    )


def _steps(name: str, summary: str, settings: Mapping[str, Any], *packages: str, needs_gpu: bool = False) -> Part:
    what = f"two steps of {summary} against plain torch on the CPU"
    arguments = {"settings": settings}
    return Part(name, what, "correctness:train_steps", 12, arguments, needs_gpu=needs_gpu, packages=packages)


def _zero(stage: int) -> Part:
    settings = {"trainer.engine": "deepspeed", "trainer.deepspeed.stage": stage}
    return _steps(f"zero_{stage}", f"DeepSpeed's ZeRO {stage}", settings, "deepspeed")


def _grpo(name: str, what: str, max_staleness: int) -> Part:
    arguments = {"max_staleness": max_staleness}
    return Part(name, what, "learning:grpo", 60, arguments, packages=("ray",))


def _generation(size: str, seconds: float) -> Part:
    summary = f"tokens a second of vLLM, random {size} model in bfloat16"
    return Part(f"generation_{size}", summary, "speed:generation", seconds, {"size": size}, packages=("vllm",))


def _training(size: str, seconds: float) -> Part:
    summary = f"tokens a second, utilisation and peak memory of training, random {size} model in bfloat16"
    return Part(f"training_{size}", summary, "speed:training", seconds, {"size": size})


def _transport(name: str, size: str, what: str) -> Part:
    arguments = {"name": name, "size": size}
    return Part(f"transport_{name}", what, "transports:transport", 40, arguments, needs_gpu=False)


PARTS: tuple[Part, ...] = (
    Part("machine", "what is here", "machine:describe", 8, needs_gpu=False),
    _engine("torch", "float32", 12, needs_gpu=False),
    _engine("torch", "bfloat16", 12, needs_gpu=True),
    _engine("vllm", "float32", 40, needs_gpu=False),
    _engine("vllm", "bfloat16", 40, needs_gpu=True),
    _steps("fsdp", "FSDP2", {}),
    _steps("fsdp_bfloat16", "FSDP2 in bfloat16", {"model.dtype": "bfloat16"}, needs_gpu=True),
    _zero(1),
    _zero(2),
    _zero(3),
    Part("flash_attention", "torch's kernel for packed attention against float32", "correctness:packed_kernel", 10),
    Part("liger", "Liger's kernels against torch's", "correctness:liger", 15, packages=("liger_kernel",)),
    Part("nf4", "an adapter on a base of four bits", "correctness:four_bits", 15, packages=("bitsandbytes", "peft")),
    Part("adamw_8bit", "moments of eight bits", "correctness:eight_bits", 12, packages=("bitsandbytes",)),
    Part("quickstart", "recipes/quickstart.yaml, shortened", "learning:quickstart", 75, packages=("ray",)),
    _transport("ipc", "0.5B", "new weights from another process's memory on the same GPU"),
    _transport("collective", "0.5B", "new weights broadcast by another process: NCCL on two GPUs, gloo on a CPU"),
    _grpo("grpo_bfloat16", "GRPO in bfloat16 learns", max_staleness=0),
    _generation("0.5B", 45),
    _training("0.5B", 20),
    _generation("1.5B", 50),
    _training("1.5B", 25),
    Part(
        "experts",
        "logprobs of the vllm engine with a mixture of experts",
        "correctness:engine_logprobs",
        45,
        {"name": "vllm", "dtype": "auto", "shape": "experts"},
        needs_gpu=False,
        packages=("vllm",),
    ),
    Part(
        "pictures",
        "logprobs of a trained vision-language model against transformers on the CPU",
        "further_models:pictures",
        20,
        needs_gpu=False,
        packages=("torchvision", "pytest"),
    ),
    Part(
        "fp8", "an export in fp8, read by vLLM", "further_models:quantized", 50, {"scheme": "fp8"}, packages=("vllm",)
    ),
    _grpo("grpo_asynchronous", "GRPO one step ahead learns", max_staleness=1),
)
