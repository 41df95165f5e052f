"""A tiny policy, adapters of it, and a server of both in this process."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlflow.model_source import ModelSource
from rlflow.recipe.adapter_files import base_of, read_config
from rlflow.serving.addresses import open_socket
from rlflow.serving.models import ServedModel, Settings, models_by_name, open_streams, read_model
from rlflow.serving.openai_server import OpenAIServer, runner_of
from rlflow.serving.streams import Streams

CONTEXT = 160


def source_of(directory: Path, name: str = "tiny") -> ModelSource:
    is_adapter = (directory / "adapter_config.json").is_file()
    base = base_of(read_config(directory)) if is_adapter else None
    return ModelSource(directory=directory, base=base, name=name, run=None, recipe=None)


@pytest.fixture(scope="session")
def policy_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("serving") / "policy"))


@pytest.fixture(scope="session")
def adapter_dirs(policy_dir: Path) -> dict[str, Path]:
    return write_adapters(policy_dir)


def write_adapters(policy_dir: Path) -> dict[str, Path]:
    """Two that change what is written, beside the policy."""
    directories = {}
    for seed, name in enumerate(("left", "right"), 1):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(policy_dir)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        adapted: Any = get_peft_model(base, config)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        directories[name] = policy_dir.parent / name
        adapted.save_pretrained(directories[name])
    return directories


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(max_model_len=CONTEXT, max_num_seqs=8)


@pytest.fixture(scope="session")
def served(policy_dir: Path, settings: Settings) -> ServedModel:
    return read_model(source_of(policy_dir), settings)


@pytest.fixture(scope="session")
def streams(served: ServedModel, settings: Settings) -> Iterator[Streams]:
    opened = open_streams(served, "torch", {}, settings)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Oracle:
    """transformers alone."""

    model: Any
    tokenizer: Any

    def write(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedily, until eos."""
        prompt = torch.tensor([list(ids)])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
        written = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return written[0, len(ids) :].tolist()

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> str:
        return self.text(self.write(self.chat_ids(messages), max_new_tokens))


@pytest.fixture(scope="session")
def oracle(policy_dir: Path) -> Oracle:
    return oracle_of(policy_dir)


def oracle_of(policy_dir: Path, adapter: Path | None = None) -> Oracle:
    model: Any = AutoModelForCausalLM.from_pretrained(policy_dir).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return Oracle(model, AutoTokenizer.from_pretrained(policy_dir))


@contextmanager
def running(server: OpenAIServer) -> Iterator[str]:
    """A server that answers in a thread; its address."""
    loop = asyncio.new_event_loop()
    runner = runner_of(server, shutdown_timeout=1.0)
    with open_socket("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        async def start() -> None:
            await runner.setup()
            await web.SockSite(runner, listening).start()

        loop.run_until_complete(start())
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield url
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            loop.close()


def server_of(
    model: ServedModel, streams: Streams, adapters: Mapping[str, Path] | None = None, token: str | None = None
) -> OpenAIServer:
    sources = {name: source_of(path, name) for name, path in (adapters or {}).items()}
    return OpenAIServer(models_by_name(model, sources, Settings(max_model_len=CONTEXT)), streams, token)


@pytest.fixture(scope="session")
def url(served: ServedModel, streams: Streams) -> Iterator[str]:
    with running(server_of(served, streams)) as address:
        yield address
