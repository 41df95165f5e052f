"""How vLLM is started in this process: what it reads from the environment, its log, and the options it is given."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import pydantic
import torch
from huggingface_hub.errors import StrictDataclassError

from rlflow.actors.rollout_engines.vllm_experts import expert_options
from rlflow.recipe.architectures import STATE_ON_CPU, why_not_vllm

if TYPE_CHECKING:
    import vllm

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's sizes of the buffers that hold an adapter's A and B."""
OTHER_WINDOWS = ("Cohere2ForCausalLM",)
"""Architectures whose logprobs differ from transformers' in texts that are longer than their sliding window."""


def prepare_process(num_threads: int, log_path: Path | None) -> None:
    """Sets what vLLM reads at its import, its log and the number of threads: the one place that does.

    In-process engine; no pinning of threads to cores, since every engine of a machine would choose the same ones; no
    usage statistics sent out.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine is vllm, but vLLM is not installed: install rlflow[cpu], or vllm on a machine with a GPU, "
            "or set rollout.engine: torch"
        )
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "0",
        "OMP_NUM_THREADS": str(num_threads),
    }
    torch.set_num_threads(num_threads)
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("vllm")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    for handler in logger.handlers:
        handler.close()
    logger.handlers = [logging.NullHandler() if log_path is None else logging.FileHandler(log_path)]
    logger.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


@contextmanager
def quiet(log_path: Path | None) -> Iterator[None]:
    """While vLLM is imported and started, Python warnings are dropped and what C++ writes to stderr joins the log."""
    saved = os.dup(2)
    with open(log_path or os.devnull, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def platform_options(
    gpu_memory_fraction: float, kv_cache_gib: float, tensor_parallel_size: int
) -> tuple[bool, dict[str, Any]]:
    """Whether the vLLM that is installed runs on the CPU, and what EngineArgs needs for that."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False, cuda_options(gpu_memory_fraction, tensor_parallel_size)
    keep_weights_as_loaded()
    return True, cpu_options(kv_cache_gib, tensor_parallel_size)


def cpu_options(kv_cache_gib: float, tensor_parallel_size: int) -> dict[str, Any]:
    """Nothing is compiled, a prompt is read in one piece, cache blocks are small.

    Reading a prompt in pieces takes a sampled token back, which vLLM's CPU random generators cannot do. The samples of
    a group share whole blocks of their prompt; at vLLM's default of 128 tokens most share none.
    """
    if tensor_parallel_size > 1:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, but this vLLM runs on the CPU: "
            "use more rollout.workers instead (rlflow infer and eval: leave out --tensor-parallel-size)"
        )
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enforce_eager": True,
        "skip_mm_profiling": True,
        "enable_chunked_prefill": False,
        "block_size": 32,
    }


def keep_weights_as_loaded() -> None:
    """Takes from vLLM the packing of linear weights for CPU kernels.

    It happens once, after the first load, and empties the originals: later loads then fail or, for tied embeddings,
    leave the packed lm_head as it was. Generation is as fast without it (benchmarks/vllm_weight_sync.py).
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def cuda_options(gpu_memory_fraction: float, tensor_parallel_size: int) -> dict[str, Any]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise ValueError(
            "rollout.engine is vllm, which runs on GPUs as it is installed here, and the worker reserves none: "
            "set rollout.gpus_per_worker: 1, or rollout.engine: torch (rlflow infer and eval: --engine torch)"
        )
    return {
        "gpu_memory_utilization": gpu_memory_fraction,
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else "uni",
        "enable_sleep_mode": True,
        # A step that has been begun when weights change would give the new version's name to tokens of the old.
        "async_scheduling": False,
    }


def start(model_dir: str, options: dict[str, Any], on_cpu: bool, is_whole: bool) -> vllm.LLM:
    """
    Args:
        is_whole: It has its weights, as the command line's engines have; a run's take them from the trainer.

    Raises:
        ValueError: vLLM refuses these options for this model.
    """
    from vllm import LLM, EngineArgs

    other = "--engine torch" if is_whole else "rollout.engine: torch"
    fixed: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    given = fixed | options
    try:
        config = EngineArgs(model_dir, **given).create_model_config()
        if reason := why_not_vllm(config.hf_config.to_dict(), on_cpu=on_cpu):
            raise ValueError(f"{reason}; set {other}")
        if on_cpu and (config.is_hybrid or config.has_inner_state):
            raise ValueError(f"{STATE_ON_CPU}; set {other}")
        if (
            config.architecture in OTHER_WINDOWS
            and (window := config.hf_text_config.sliding_window) < config.max_model_len
        ):
            raise ValueError(
                f"texts that are longer than its sliding window, {window} tokens, have other logprobs in vLLM than in "
                f"transformers: keep data.max_prompt_tokens and rollout.max_new_tokens within it, or set {other}"
            )
        given |= expert_options(config, on_cpu=on_cpu, with_adapter="enable_lora" in options)
        return LLM.from_engine_args(EngineArgs(model_dir, **given))
    except torch.OutOfMemoryError:
        raise
    # A NotImplementedError is a RuntimeError.
    except (
        AssertionError,
        AttributeError,
        KeyError,
        OSError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(_problem(model_dir, error, options, other, is_whole)) from error


def _problem(model_dir: str, error: Exception, options: dict[str, Any], other: str, is_whole: bool) -> str:
    """What vLLM says of its options, or what fails in its code for a model or in transformers' that it calls."""
    if not isinstance(error, ValueError):
        return f"vLLM fails on {model_dir} ({type(error).__name__}: {shorten(str(error), 400)}): set {other}"
    problems = [e["msg"] for e in error.errors()] if isinstance(error, pydantic.ValidationError) else [str(error)]
    said = shorten("; ".join(problems), 600, placeholder=" ...")
    length_from = "--max-model-len" if is_whole else "data.max_prompt_tokens and rollout.max_new_tokens"
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    return (
        f"vLLM cannot run {model_dir}: {said} (with {settings}; max_model_len comes from {length_from}; "
        f"{other} runs every model that can be trained)"
    )
