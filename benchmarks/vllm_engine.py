"""The vLLM engine, stepped, against vLLM's own LLM.generate: the same requests, in turns, in one process.

    OMP_NUM_THREADS=1 python benchmarks/vllm_engine.py

Both run on the same vLLM, with the same random weights, seeds, prompts and lengths. Results: benchmarks/vllm_engine.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.vllm_engine import VllmEngine
from rlflow.types import SampleRequest, SamplingParams

SIZES: dict[str, dict[str, Any]] = {
    "0.8M": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "25M": {"vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8},
}
PROMPTS, GROUP, PROMPT_TOKENS = 8, 8, 64


def start(size: str, directory: Path) -> VllmEngine:
    config = Qwen3Config(
        **SIZES[size], num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    engine = VllmEngine(
        str(directory),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=PROMPTS * GROUP,
        seed=0,
        gpu_memory_fraction=0.5,
        kv_cache_gib=1.0,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=None,
        num_threads=torch.get_num_threads(),
    )
    engine.load_weights(model.named_parameters(), 0)
    return engine


def make_requests(lengths: str, new_tokens: int) -> list[SampleRequest]:
    """Of one length, or of lengths drawn between 1 and twice the mean."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 500, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    of_each = [new_tokens] * (PROMPTS * GROUP)
    if lengths == "varied":
        of_each = rng.integers(1, 2 * new_tokens, PROMPTS * GROUP).tolist()
    return [SampleRequest(i, prompts[i // GROUP], i, SamplingParams(n)) for i, n in enumerate(of_each)]


def stepped(engine: VllmEngine, requests: list[SampleRequest]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in generate(engine, requests)]


def at_once(engine: VllmEngine, requests: list[SampleRequest]) -> list[list[int]]:
    """As an application of vLLM's calls it: prompts and parameters in, lists out."""
    from vllm import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=request.token_ids.tolist()) for request in requests]
    sampling = [engine.sampling_of(request) for request in requests]
    engine.llm.reset_prefix_cache()
    with torch.compiler.set_stance("force_eager"):
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure(engine: VllmEngine, requests: list[SampleRequest], rounds: int) -> str:
    """Both in turns, the order changing. Returns the end of a row: tokens a second in the run that was disturbed least,
    the ratio of these, and the medians of the ratios of two runs that came one after the other."""
    ways: list[Callable[..., list[list[int]]]] = [at_once, stepped]
    assert stepped(engine, requests) == at_once(engine, requests), "not the same tokens"
    wall: dict[Any, list[float]] = {way: [] for way in ways}
    cpu: dict[Any, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways if turn % 2 else reversed(ways):
            started, used = time.perf_counter(), time.process_time()
            way(engine, requests)
            wall[way].append(time.perf_counter() - started)
            cpu[way].append(time.process_time() - used)
    tokens = sum(request.params.max_new_tokens for request in requests)
    ratios = [
        statistics.median(b / a for a, b in zip(seconds[stepped], seconds[at_once], strict=True))
        for seconds in (wall, cpu)
    ]
    rates = [tokens / min(cpu[way]) for way in (at_once, stepped)]
    return f"{rates[0]:7.0f} | {rates[1]:7.0f} | {rates[1] / rates[0]:5.3f} | {ratios[1]:5.3f} | {ratios[0]:5.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.8M")
    parser.add_argument("--new-tokens", type=int, default=110, help="in the mean")
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        engine = start(given.size, Path(directory))
        print("| model | lengths | LLM.generate, tokens a CPU second | stepped | ratio | CPU, median | wall, median |")
        print("|---|---|---|---|---|---|---|")
        for lengths in ("equal", "varied"):
            row = measure(engine, make_requests(lengths, given.new_tokens), given.rounds)
            print(f"| {given.size} | {lengths}, {given.new_tokens} in the mean | {row}", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
