"""`rlflow serve` with the torch engine beside transformers' generate: tokens a second for 1, 8 and 32 clients at once.

    python benchmarks/serve.py                                                 # a tiny model with random weights
    python benchmarks/serve.py --model models/SmolLM2-135M-Instruct --rounds 1   # rlflow.data.smollm2 writes it

Every client asks for a streamed answer of --tokens tokens, greedily, and then for the next. generate answers the same
prompts, one after the other and all at once. The arms take turns in each round, each in a process of one thread, as the
clients are; benchmarks/serve.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import aiohttp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from rlflow.data.tokenizer import build_character_tokenizer

CLIENTS = (1, 8, 32)
CHARACTERS = "0123456789+-*/=(). ,?!:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"


def write_tiny_model(directory: Path) -> None:
    """0.82M parameters, the `tiny` of benchmarks/torch_engine.py."""
    tokenizer = build_character_tokenizer(CHARACTERS)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes, **heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prompts_of(num_clients: int, per_client: int) -> list[list[dict[str, str]]]:
    """Questions of unlike lengths."""
    texts = [
        f"What is {7 * i} plus {i * i}?" + " Say it in a few words." * (i % 3) for i in range(num_clients * per_client)
    ]
    return [[{"role": "user", "content": text}] for text in texts]


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server of it."""
    words = [sys.executable, "-m", "rlflow", "serve", str(model), "--engine", "torch", "--port", "0", "--name", "m"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[3]
    finally:
        process.terminate()
        process.wait(30)


async def ask_all(url: str, prompts: Sequence[Any], num_clients: int, num_tokens: int) -> tuple[float, float]:
    """Seconds for all of them, and the median to a first piece."""
    waiting: list[Any] = list(prompts)
    firsts: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            body = {"model": "m", "messages": waiting.pop(), "max_tokens": num_tokens, "temperature": 0}
            began = time.perf_counter()
            body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
            async with session.post(f"{url}/chat/completions", json=body) as answer:
                lines = []
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        lines.append(line)
                    if len(lines) == 1 and line.startswith(b"data: "):
                        firsts.append(time.perf_counter() - began)
            usage = json.loads(lines[-2][6:])["usage"]
            assert usage["completion_tokens"] == num_tokens, lines[-2]

    started = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
    return time.perf_counter() - started, statistics.median(firsts)


def generate_all(model: Any, tokenizer: Any, prompts: Sequence[Any], num_tokens: int, together: int) -> float:
    """Seconds for all of them, so many in a call."""
    started = time.perf_counter()
    for start in range(0, len(prompts), together):
        inputs = tokenizer.apply_chat_template(
            list(prompts[start : start + together]),
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs.pop("token_type_ids", None)
        options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        written = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id or 0)
        assert written.shape[1] == inputs["input_ids"].shape[1] + num_tokens
    return time.perf_counter() - started


def measure(directory: Path, rounds: int, num_tokens: int, per_client: int) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rates: dict[tuple[int, str], list[float]] = {}
    with served(directory) as url:
        asyncio.run(ask_all(url, prompts_of(2, 1), 2, num_tokens))
        generate_all(model, tokenizer, prompts_of(2, 1), num_tokens, 2)
        for _ in range(rounds):
            for num_clients in CLIENTS:
                prompts = prompts_of(num_clients, per_client)
                total = len(prompts) * num_tokens
                seconds, first = asyncio.run(ask_all(url, prompts, num_clients, num_tokens))
                together = generate_all(model, tokenizer, prompts, num_tokens, num_clients)
                alone = generate_all(model, tokenizer, prompts[:4], num_tokens, 1)
                found = {"server": total / seconds, "together": total / together, "first": 1000 * first}
                for name, value in (found | {"alone": min(4, len(prompts)) * num_tokens / alone}).items():
                    rates.setdefault((num_clients, name), []).append(value)
    print(
        "| clients | server | generate, all at once | generate, one by one | server / all at once | first piece, ms |"
    )
    print("|---|---|---|---|---|---|")
    for num_clients in CLIENTS:
        server, together, alone, first = (rates[num_clients, n] for n in ("server", "together", "alone", "first"))
        ratios = [a / b for a, b in zip(server, together, strict=True)]
        row = [f"{statistics.median(values):,.0f}" for values in (server, together, alone)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {num_clients} | {' | '.join(row)} | {spread} | {statistics.median(first):,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory; a tiny model with random weights when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--per-client", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.model or Path(scratch) / "tiny"
        if arguments.model is None:
            write_tiny_model(directory)
        measure(directory, arguments.rounds, arguments.tokens, arguments.per_client)


if __name__ == "__main__":
    main()
