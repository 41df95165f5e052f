"""Three ways to give a running vLLM on a CPU new weights, on a model with tied embeddings.

    python benchmarks/vllm_weight_sync.py models/SmolLM2-135M-Instruct

SmolLM2-135M-Instruct, float32, one thread of a shared AVX-512 machine, 64 sequences of 40 + 64 tokens:

| weights in the engine                | sync      | generation  | largest logprob error after a sync |
|--------------------------------------|-----------|-------------|------------------------------------|
| as loaded (what rlflow does)         |    0.13 s |   159 tok/s |                              2e-05 |
| packed, reload and pack again        |    0.80 s |   171 tok/s |                              4e-05 |
| packed, reload_weights alone         |    0.69 s |   159 tok/s |                              2e+01 |

The last row is how vLLM 0.32 behaves by itself: the packed lm_head keeps its old weights, without a word.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlflow.actors.rollout_engines import vllm_start
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.vllm_engine import VllmEngine
from rlflow.types import SampleRequest, SamplingParams

STRATEGIES = {
    "plain": "as loaded (what rlflow does)",
    "repacked": "packed, reload and pack again",
    "reloaded": "packed, reload_weights alone",
}


def build_engine(strategy: str, model_dir: str) -> VllmEngine:
    keep = vllm_start.keep_weights_as_loaded if strategy == "plain" else lambda: None
    with mock.patch.object(vllm_start, "keep_weights_as_loaded", keep):
        return VllmEngine(
            model_dir,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=64,
            seed=0,
            gpu_memory_fraction=0.0,
            kv_cache_gib=1.0,
            tensor_parallel_size=1,
            trust_remote_code=False,
            log_path=None,
            num_threads=1,
        )


def sync(strategy: str, engine: VllmEngine, policy: PreTrainedModel) -> float:
    """Returns seconds."""
    started = time.perf_counter()
    if strategy == "plain":
        engine.load_weights(policy.named_parameters(), 0)
    else:
        weights = list(policy.named_parameters())
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    if strategy == "repacked":
        engine.llm.apply_model(repack)
    return time.perf_counter() - started


def repack(model: Any) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


@torch.no_grad()
def measure(strategy: str, model_dir: str) -> str:
    """Syncs five times, each time with other weights, then generates three times. Returns a row of the table."""
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    engine = build_engine(strategy, model_dir)
    seconds = []
    for _ in range(5):
        for parameter in policy.parameters():
            parameter.mul_(1.002)
        seconds.append(sync(strategy, engine, policy))
    rng = np.random.default_rng(0)
    prompts, params = rng.integers(5, 400, size=(8, 40)).astype(np.int32), SamplingParams(max_new_tokens=64)
    requests = [SampleRequest(i, prompts[i // 8], i, params) for i in range(64)]
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        completions = generate(engine, requests)
        rates.append(sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started))
    token_ids = torch.from_numpy(np.concatenate([requests[0].token_ids, completions[0].token_ids])).long()
    expected = policy(token_ids[None]).logits[0, 39:-1].log_softmax(-1).gather(1, token_ids[40:, None]).squeeze(1)
    error = np.abs(completions[0].logprobs - expected.numpy()).max()
    return f"| {STRATEGIES[strategy]:36} | {min(seconds):7.2f} s | {max(rates):5.0f} tok/s | {error:34.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--strategy", choices=STRATEGIES, help="one of them, in this process")
    arguments = parser.parse_args()
    if arguments.strategy:
        print(measure(arguments.strategy, arguments.model_dir))
        return
    for strategy in STRATEGIES:
        subprocess.run([sys.executable, __file__, arguments.model_dir, "--strategy", strategy], check=True)


if __name__ == "__main__":
    main()
