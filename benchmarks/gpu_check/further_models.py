"""Models that are more than text, or less than their whole weights."""

from __future__ import annotations

import numpy as np
from measurements import Record
from models import SHAPES, device, make_engine, plain_logprobs, random_policy, save_policy, write_config

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.train_engines.token_model import load_token_model, score
from rlflow.batching import pack
from rlflow.quantization.compressed import quantize_directory
from rlflow.quantization.schemes import SCHEMES
from rlflow.recipe import ModelBlock
from rlflow.types import SampleRequest, SamplingParams


def pictures(record: Record) -> None:
    """Packed sequences with a picture, with none and with two, against transformers on the CPU, one at a time."""
    from tests.actors.train_engines import test_pictures as plain
    from tests.seeing_models import write_seeing_model

    directory = write_seeing_model(record.directory / "model")
    samples = plain.samples_of(directory)
    (batches,) = pack(samples, max_tokens=4096, num_ranks=1)
    exact = np.concatenate([plain.plain_logprobs(directory, sample) for sample in samples])
    for dtype, most in (("float32", 1e-3), ("bfloat16", 0.1)):
        module = load_token_model(ModelBlock(path=str(directory), dtype=dtype), seed=0, device=device())
        error = np.abs(score(module, list(batches), device(), 1.0) - exact)
        record.add(f"mean error of logprobs in {dtype}", error[exact != 0].mean(), most=most)


def quantized(record: Record, scheme: str) -> None:
    """Logprobs that vLLM reports with rounded weights, against transformers with the whole ones."""
    source = write_config("small", record.directory)
    policy = save_policy(source, seed=0)
    target = record.directory / scheme
    target.mkdir()
    quantize_directory(
        source, target, SCHEMES[scheme], dtype="bfloat16", trust_remote_code=False, progress=lambda done, of: None
    )
    engine = make_engine("vllm", target, "bfloat16", record.directory / "vllm.log", is_whole=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, SHAPES["small"]["vocab_size"], 40).astype(np.int32) for _ in range(16)]
    requests = [SampleRequest(i, prompt, i, SamplingParams(max_new_tokens=48)) for i, prompt in enumerate(prompts)]
    completions = generate(engine, requests)
    engine.close()
    whole, other = policy.double(), random_policy(source, seed=1).double()
    reported = np.concatenate([completion.logprobs for completion in completions]).astype(np.float64)
    for name, model, bounds in (("the whole weights", whole, {"most": 0.2}), ("other weights", other, {"least": 0.5})):
        own = [
            plain_logprobs(model, np.concatenate([prompt, completion.token_ids]))[len(prompt) - 1 :]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        record.add(f"mean distance to {name}", np.abs(reported - np.concatenate(own)).mean(), **bounds)
