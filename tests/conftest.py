"""What tests share: one local Ray, one tiny model. Nothing here reaches a network, and each process has one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

CHARACTERS = "0123456789+-*/=(). ,?!:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


LONGEST_FIRST = (
    "tests/actors/test_gradient_splits.py",
    "tests/actors/train_engines/test_train_engine_contract.py",
    "tests/rlflow/driver/test_driver_run.py",
    "tests/actors/test_sequence_parallel.py",
    "tests/rlflow/driver/test_driver_rows.py",
    "tests/rlflow/driver/test_driver_adapters.py",
    "tests/test_recipes_run.py",
    "tests/actors/test_reward_process.py",
)
"""Files that would keep one process busy while the others have nothing left to do."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of 8 logical CPUs for the whole session, whatever cluster the environment names."""
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 1024**2,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of some 50,000 random float32 parameters: Qwen3, tied embeddings, a token a character.

    The weights are large enough for the next-token distribution to be far from uniform, so that a wrong logprob shows.
    """
    from transformers import Qwen3Config

    directory = tmp_path_factory.mktemp("tiny_model")
    _write_model(directory, Qwen3Config, 0.25, hidden_size=48, tie_word_embeddings=True, num_hidden_layers=2)
    return directory


@pytest.fixture(scope="session")
def tiny_teacher_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model_dir`` with weights that are a little different."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    directory = tmp_path_factory.mktemp("tiny_teacher")
    for file in tiny_model_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    generator = np.random.default_rng(0)
    weights = load_file(directory / "model.safetensors")
    moved = {name: w + 0.05 * generator.standard_normal(w.shape).astype(w.dtype) for name, w in weights.items()}
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def tiny_moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_model_dir``, a Qwen3-MoE, untied: 8 experts, of which a token takes 2; the middle layer is dense."""
    from transformers import Qwen3MoeConfig

    directory = tmp_path_factory.mktemp("tiny_moe")
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    sizes = {"hidden_size": 64, "tie_word_embeddings": False, "num_hidden_layers": 3}
    _write_model(directory, Qwen3MoeConfig, 0.1, **sizes, **experts)
    return directory


def _write_model(directory: Path, make_config: Any, spread: float, **sizes: Any) -> None:
    """Config, random weights of this standard deviation, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlflow.data.tokenizer import build_character_tokenizer

    tokenizer = build_character_tokenizer(CHARACTERS, CHAT_TEMPLATE)
    config = make_config(
        vocab_size=len(tokenizer),
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
