"""python -m rlflow.quantization.vllm_likelihood MODEL TEXTS.json SUMS.json: negative log-likelihoods by vLLM."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("sums", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()
    texts = json.loads(arguments.texts.read_text(encoding="utf-8"))
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    arguments.sums.write_text(
        json.dumps(likelihoods(arguments.model, texts, arguments.trust_remote_code)), encoding="utf-8"
    )


def likelihoods(model: str, texts: list[list[int]], trust_remote_code: bool) -> list[float]:
    """The negative log-likelihood of each text's tokens but the first."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    options: dict[str, Any] = {"max_model_len": max(map(len, texts)) + 1, "trust_remote_code": trust_remote_code}
    if current_platform.is_cpu():
        options |= {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": 2**30}
    llm = LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], wanted, use_tqdm=False)
    sums = []
    for ids, output in zip(texts, outputs, strict=True):
        positions = output.prompt_logprobs
        assert positions is not None
        sums.append(-sum(row[token].logprob for token, row in zip(ids[1:], positions[1:], strict=True) if row))
    return sums


if __name__ == "__main__":
    main()
