"""Tokens a second and memory, of random models in bfloat16."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from measurements import Record
from models import (
    denominators_of,
    device,
    load,
    make_trainer,
    random_batch,
    random_policy,
    recipe_of,
    save_policy,
    write_config,
)

from rlflow.memory import ModelShape, read_shape
from rlflow.planning import make_plans
from rlflow.types import SampleRequest, SamplingParams

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense operations a second in bfloat16, from NVIDIA's data sheets, by a part of the GPU's name."""
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 32, 8, 256, 512
SEQUENCE_TOKENS, MICRO_BATCH_TOKENS, TIMED_STEPS = 1024, 8192, 4


def generation(record: Record, size: str) -> None:
    """Completions of 512 tokens to 32 prompts of 256, eight each, all at once, with vLLM's own random weights."""
    from rlflow.actors.rollout_engines.engine import generate
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    engine = VllmEngine(
        str(write_config(size, record.directory)),
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_num_seqs=PROMPTS * GROUP,
        seed=0,
        gpu_memory_fraction=0.5,
        kv_cache_gib=1.0,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=record.directory / "vllm.log",
        num_threads=4,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 1000, PROMPT_TOKENS).astype(np.int32) for _ in range(PROMPTS)]
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    requests = [SampleRequest(i, prompts[i // GROUP], i, params) for i in range(PROMPTS * GROUP)]
    generate(engine, [replace(request, params=SamplingParams(max_new_tokens=16)) for request in requests[: 4 * GROUP]])
    started = time.perf_counter()
    completions = generate(engine, requests)
    seconds = time.perf_counter() - started
    record.add("completions at once", len(completions))
    record.add("generated", sum(len(c.token_ids) for c in completions) / seconds, "tokens/s")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        record.add("memory in use, half the GPU being vLLM's", (total - free) / 2**30, "GiB")
    policy = random_policy(record.directory / size, seed=0, dtype=torch.bfloat16).to(device())
    started = time.perf_counter()
    load(engine, policy, 1)
    seconds = time.perf_counter() - started
    record.add("new weights, by way of host memory", policy.num_parameters() * 2 / 2**30 / seconds, "GiB/s")
    engine.close()


def training(record: Record, size: str) -> None:
    """Steps of one micro-batch of 8,192 tokens in sequences of 1,024, with each way to hold activations."""
    directory = write_config(size, record.directory)
    save_policy(directory, seed=0, dtype=torch.bfloat16)
    for checkpointing in (False, True):
        settings = {
            "model.dtype": "bfloat16",
            "trainer.tokens_per_micro_batch": MICRO_BATCH_TOKENS,
            "trainer.gradient_checkpointing": checkpointing,
            "data.max_tokens": SEQUENCE_TOKENS,
            "data.prompts_per_step": MICRO_BATCH_TOKENS // SEQUENCE_TOKENS,
        }
        _time_steps(record, recipe_of(directory, settings), "checkpointing" if checkpointing else "all kept")


def _time_steps(record: Record, recipe: Any, what: str) -> None:
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(recipe)
    lengths = [SEQUENCE_TOKENS] * (MICRO_BATCH_TOKENS // SEQUENCE_TOKENS)
    batch = random_batch(lengths, vocabulary=1000, seed=0)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        trainer.forward_backward([batch], recipe.algorithm, denominators_of(batch))
        assert not trainer.optim_step(1e-6).skipped
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    shape = read_shape(recipe.model)
    of_step = sum(seconds[1:]) / TIMED_STEPS
    record.add(f"trained, {what}", MICRO_BATCH_TOKENS / of_step, "tokens/s")
    if not on_gpu:
        return
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is not None:
        used = flops_of_token(shape, SEQUENCE_TOKENS) * MICRO_BATCH_TOKENS / of_step / peak
        record.add(f"model FLOPs utilisation, {what}", 100 * used, f"% of {peak / 1e12:.0f} TFLOPS")
    (plan,) = make_plans([recipe])
    estimate = next(planned.gpu_bytes_each for planned in plan.roles if planned.role.name == "trainer")
    measured = torch.cuda.max_memory_allocated()
    record.add(f"peak memory allocated, {what}", measured / 2**30, "GiB")
    record.add(f"plan's estimate over it, {what}", estimate / measured)


def flops_of_token(shape: ModelShape, length: int) -> float:
    """Operations that training one token of a sequence of ``length`` needs: 6 for each weight that multiplies it, and
    attention to half the sequence (arXiv 2204.02311, appendix B, with causality). What is computed again is no work."""
    weights = shape.layers * shape.layer_parameters + shape.head_parameters
    return 6 * weights + 6 * shape.layers * shape.query_width * length
