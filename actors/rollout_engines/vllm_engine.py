"""Generation with vLLM, in this process: CPU builds and CUDA builds alike.

The engine starts without weights and takes every version of them from the trainer. Each sample has its own seed, and
nothing outlives a batch (the prefix cache serves the samples of one prompt, then it is dropped), so completions are a
function of the weights and the batch alone.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pydantic
import torch

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.rollout_engines.vllm_experts import expert_options, pack_experts
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, FinishReason, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import vllm

    from rlflow.actors.rollout_engines.vllm_adapter import VllmAdapter

LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this temperature when it is asked for less, other than 0."""


class VllmEngine:
    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        seed: int,
        gpu_memory_fraction: float,
        kv_cache_gib: float,
        tensor_parallel_size: int,
        trust_remote_code: bool,
        log_path: Path | None,
        num_threads: int,
        adapted: ModelBlock | None = None,
    ) -> None:
        """Builds the model without weights: they arrive through load_weights, and model_dir need not hold any.

        Args:
            model_dir: Directory or hub id with the model's config.
            dtype: Of the weights, as torch spells it.
            max_model_len: Longest sequence in tokens, prompt and completion.
            max_num_seqs: Completions generated at a time.
            seed: Of vLLM's own random state; samples never draw from it.
            gpu_memory_fraction: Share of the GPU's memory for weights and key-value cache (GPU only).
            kv_cache_gib: Size of the key-value cache in GiB (CPU only).
            tensor_parallel_size: GPUs the model is split over.
            trust_remote_code: Run code that the model repository brings.
            log_path: Where vLLM's log is appended; dropped when None.
            num_threads: Compute threads (CPU).
            adapted: Of a policy with an adapter, its block: the base is read from model_dir, and what arrives through
                load_weights is the adapter alone.

        Raises:
            ValueError: vLLM is not installed, it refuses these settings for this model (a max_model_len beyond the
                model's, a cache too small for one sequence), or it could not take new weights for it.
        """
        _prepare_process(num_threads, log_path)
        self.adapter = None if adapted is None else _adapter_of(adapted)
        self.shapes = _weight_shapes(model_dir, trust_remote_code) if self.adapter is None else self.adapter.shapes
        options: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "seed": seed % 2**32,
            "trust_remote_code": trust_remote_code,
        }
        if self.adapter is not None:
            options |= {"load_format": "auto", **self.adapter.options}
        with _quiet(log_path):
            from vllm.platforms import current_platform

            self.on_cpu = current_platform.is_cpu()
            if self.on_cpu:
                _keep_weights_as_loaded()
                options |= _cpu_options(kv_cache_gib, tensor_parallel_size)
            else:
                options |= _cuda_options(gpu_memory_fraction, tensor_parallel_size)
            self.llm = _start(model_dir, options, self.on_cpu)
        self.max_model_len = max_model_len

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies every weight in, cast to the engine's dtype. The engine must be awake.

        Args:
            weights: A checkpoint's names and whole tensors; a tied lm_head is left out.

        Raises:
            ValueError: A name the model does not have, another shape, or a weight left out. Nothing was loaded then.
        """
        tensors = list(weights)
        _check_weights(tensors, self.shapes)
        if self.adapter is not None:
            self.adapter.load(self.llm, tensors)
            return
        for unset in self.llm.apply_model(partial(_load_into, tensors=tensors, on_cpu=self.on_cpu)):
            if unset:
                raise ValueError(f"weight sync: vLLM's model got no values for {', '.join(unset)}")

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on, and those of an earlier call theirs back."""
        self.llm.apply_model(partial(_leave_out, ids=torch.from_numpy(ids)))

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """One completion a seed, in the order of requests and of their seeds.

        Raises:
            ValueError: A prompt leaves no room for max_new_tokens, or vLLM cannot sample with these parameters.
        """
        if 0 < params.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature {params.temperature}: vLLM would sample at {LOWEST_TEMPERATURE}; use 0 for greedy"
            )
        from vllm import SamplingParams as VllmSamplingParams
        from vllm import TokensPrompt

        prompts, sampling = [], []
        for i, request in enumerate(requests):
            prompt = request.prompt_token_ids.tolist()
            if len(prompt) + params.max_new_tokens > self.max_model_len:
                raise ValueError(
                    f"request {i}: {len(prompt)} prompt tokens and {params.max_new_tokens} new ones exceed the "
                    f"engine's max_model_len of {self.max_model_len}"
                )
            for seed in request.seeds:
                prompts.append(TokensPrompt(prompt_token_ids=prompt))
                sampling.append(
                    VllmSamplingParams(
                        max_tokens=params.max_new_tokens,
                        temperature=params.temperature,
                        top_p=params.top_p,
                        top_k=params.top_k,
                        seed=_fold(seed) if self.on_cpu else seed,
                        stop_token_ids=list(params.stop_token_ids),
                        ignore_eos=True,
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
        request_of_version = None if self.adapter is None else self.adapter.request
        assert self.adapter is None or request_of_version is not None, "generate before the first adapter"
        was_reset = self.llm.reset_prefix_cache()
        assert was_reset, "requests of an earlier batch are still running"
        # One of vLLM's sampling helpers is a torch.compile function: on a CPU, half a minute of C++ at the first token.
        with torch.compiler.set_stance("force_eager") if self.on_cpu else nullcontext():
            outputs = self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=request_of_version)
        return [_completion(output.outputs[0]) for output in outputs]

    def sleep(self) -> None:
        """Gives GPU memory back between generations: weights to host memory, key-value cache dropped. No-op on CPU."""
        if not self.on_cpu:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Takes the GPU memory again; the weights are those it fell asleep with. No-op on CPU."""
        if not self.on_cpu:
            self.llm.wake_up()

    def close(self) -> None:
        """Stops vLLM and frees its memory. The engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def _adapter_of(block: ModelBlock) -> VllmAdapter:
    from rlflow.actors.rollout_engines.vllm_adapter import VllmAdapter

    return VllmAdapter(block)


def _prepare_process(num_threads: int, log_path: Path | None) -> None:
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
def _quiet(log_path: Path | None) -> Iterator[None]:
    """While vLLM is imported and started, Python warnings are dropped and what C++ writes to stderr joins the log."""
    saved = os.dup(2)
    with open(log_path or os.devnull, "a") as log:
        os.dup2(log.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _cpu_options(kv_cache_gib: float, tensor_parallel_size: int) -> dict[str, Any]:
    """Nothing is compiled, a prompt is read in one piece, cache blocks are small.

    Reading a prompt in pieces takes a sampled token back, which vLLM's CPU random generators cannot do. The samples of
    a group share whole blocks of their prompt; at vLLM's default of 128 tokens most share none.
    """
    if tensor_parallel_size > 1:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, but this vLLM runs on the CPU: "
            "use more rollout.workers instead"
        )
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "block_size": 32,
    }


def _keep_weights_as_loaded() -> None:
    """Takes from vLLM the packing of linear weights for CPU kernels.

    It happens once, after the first load, and empties the originals: later loads then fail or, for tied embeddings,
    leave the packed lm_head as it was. Generation is as fast without it (benchmarks/vllm_weight_sync.py).
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _cuda_options(gpu_memory_fraction: float, tensor_parallel_size: int) -> dict[str, Any]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise ValueError(
            "rollout.engine is vllm, which runs on GPUs as it is installed here, and the worker reserves none: "
            "set rollout.gpus_per_worker: 1, or rollout.engine: torch"
        )
    return {
        "gpu_memory_utilization": gpu_memory_fraction,
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else "uni",
        "enable_sleep_mode": True,
    }


def _fold(seed: int) -> int:
    """63 bits to 32, which is all that vLLM's CPU random generators keep: without it 0 and 2**62 are one seed."""
    return (seed ^ seed >> 32) & 0xFFFFFFFF


def _start(model_dir: str, options: dict[str, Any], on_cpu: bool) -> vllm.LLM:
    from vllm import LLM, EngineArgs

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
        given |= expert_options(config, on_cpu=on_cpu, with_adapter="enable_lora" in options)
        return LLM.from_engine_args(EngineArgs(model_dir, **given))
    except ValueError as error:
        problems = [e["msg"] for e in error.errors()] if isinstance(error, pydantic.ValidationError) else [str(error)]
        settings = ", ".join(f"{key} {value}" for key, value in options.items())
        raise ValueError(
            f"vLLM cannot run {model_dir}: {'; '.join(problems)} (with {settings}; max_model_len comes from "
            "data.max_prompt_tokens and rollout.max_new_tokens)"
        ) from error


def _weight_shapes(model_dir: str, trust_remote_code: bool) -> dict[str, torch.Size]:
    """The parameters a trainer of this model sends: a checkpoint's names, tied ones once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: parameter.shape for name, parameter in to_checkpoint(model, model.named_parameters())}


def _check_weights(tensors: list[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]) -> None:
    for name, tensor in tensors:
        if name not in shapes:
            raise ValueError(f"weight sync: the engine's model has no parameter {name}")
        if tensor.shape != shapes[name]:
            both = f"{tuple(tensor.shape)} sent, {tuple(shapes[name])} here"
            raise ValueError(f"weight sync: {name} has another shape: {both}")
    missing = sorted(shapes.keys() - {name for name, _ in tensors})
    if missing:
        raise ValueError(f"weight sync: {len(missing)} parameters were not sent, among them {missing[0]}")


def _load_into(model: Any, tensors: list[tuple[str, torch.Tensor]], on_cpu: bool) -> list[str]:
    """Runs in every worker of the engine. Returns vLLM's names of parameters that no tensor reached."""
    reached = model.load_weights(iter(tensors))
    if on_cpu:
        pack_experts(model)
    return sorted({name for name, _ in model.named_parameters()} - reached)


def _leave_out(model: Any, ids: torch.Tensor) -> None:
    """Runs in every worker of the engine. What vLLM makes of logits, cuts and logprobs, comes after the model's own."""
    vars(model).pop("compute_logits", None)
    if not len(ids):
        return
    compute_logits, ids = model.compute_logits, ids.to(next(model.parameters()).device)

    def of_tokens(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = compute_logits(*args, **kwargs)
        # Of workers that share a model one alone has them.
        return None if logits is None else logits.index_fill_(-1, ids, -torch.inf)

    model.compute_logits = of_tokens


def _completion(output: vllm.CompletionOutput) -> Completion:
    from vllm.logprobs import FlatLogprobs

    assert isinstance(output.logprobs, FlatLogprobs)
    token_ids = np.array(output.token_ids, dtype=np.int32)
    logprobs = np.array(output.logprobs.logprobs, dtype=np.float32)
    assert len(token_ids) == len(logprobs) > 0, "vLLM returned another number of logprobs than of tokens"
    assert output.finish_reason in get_args(FinishReason), f"vLLM finished for {output.finish_reason}"
    return Completion(token_ids, logprobs, cast(FinishReason, output.finish_reason))
