"""`--engine vllm` as a user calls it: vLLM's own server, and vLLM in the process of `rlflow eval`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.rlflow.serving.conftest import oracle_of, write_adapters
from tests.rlflow.serving.test_serving_text import byte_level

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "12+30="}]
START_S = 200.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"


def write_policy(directory: Path) -> None:
    """Of texts: vLLM's server does not start with a tokenizer of a few characters."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.slow
def test_vllms_own_server_answers_as_transformers_with_adapters_beside_the_base(
    tmp_path: Path,
) -> None:
    policy_dir = tmp_path / "policy"
    write_policy(policy_dir)
    adapter_dirs = write_adapters(policy_dir)
    words = [sys.executable, "-m", "rlflow", "serve", str(policy_dir), "--engine", "vllm", "--port", "0"]
    words += ["--name", "tiny", "--kv-cache-gib", "0.05", "--max-model-len", "128", "--max-num-seqs", "4"]
    words += ["--token", "secret", "--adapters", *(f"{name}={path}" for name, path in adapter_dirs.items())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("serving tiny, left, right at http://127.0.0.1:")
        url = said.split()[5].removesuffix("/v1")
        _wait_until_healthy(url, process, tmp_path / "log")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)
        assert {model.id for model in client.models.list()} == {"tiny", "left", "right"}
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        expected = {"tiny": oracle_of(policy_dir)} | {
            name: oracle_of(policy_dir, path) for name, path in adapter_dirs.items()
        }
        for name, model in expected.items():
            options = {"model": name, "messages": QUESTION, "max_tokens": 16, "stream": True}
            chunks = client.chat.completions.create(**options)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            # A character that lacks bytes at the end is left out.
            assert said == model.answer(QUESTION, 16).rstrip("\N{REPLACEMENT CHARACTER}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_eval_with_vllm_judges_the_answers_that_transformers_gives(tmp_path: Path) -> None:
    policy_dir, data, results = tmp_path / "policy", tmp_path / "sums.jsonl", tmp_path / "results"
    write_policy(policy_dir)
    questions = [f"{i}+{i}=" for i in range(5)]
    oracle = oracle_of(policy_dir)
    expected = [oracle.answer([{"role": "user", "content": question}], 8) for question in questions]
    # The first two are what the policy says, the others are not.
    solutions = [*expected[:2], "no", "no", "no"]
    rows = [{"prompt": question, "solution": right} for question, right in zip(questions, solutions, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "rlflow", "eval", str(policy_dir), "--engine", "vllm", "--sets", str(data)]
    words += ["--reward", "exact_match", "--max-new-tokens", "8", "--output", str(results)]
    words += ["--kv-cache-gib", "0.05", "--max-model-len", "64", "--max-num-seqs", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_KVCACHE_SPACE"}
    called = subprocess.run(words, capture_output=True, text=True, timeout=START_S, env=environment)
    assert called.returncode == 0, called.stderr[-3000:]
    samples = [json.loads(line) for line in (results / "sums.jsonl").read_text().splitlines()]
    # A character that lacks bytes at the end is left out.
    responses = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in expected]
    assert [sample["response"] for sample in samples] == responses
    assert [sample["passed"] for sample in samples] == [True, True, False, False, False]


def _wait_until_healthy(url: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not healthy in {START_S} s: {log.read_text()[-3000:]}")
