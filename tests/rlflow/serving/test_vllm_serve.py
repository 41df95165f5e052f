"""`rlflow serve --engine vllm`: vLLM's own server, started as a user starts it."""

from __future__ import annotations

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
