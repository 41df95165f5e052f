"""The engines that test_engine_contract.py is of, and the policies whose weights they have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from tests.actors.rollout_engines.engine_oracle import random_policy, sync, write_config

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.engine import RolloutEngine

MAX_NUM_SEQS = 8


def make_engine(name: str, directory: Path) -> RolloutEngine:
    if name == "torch":
        from rlflow.actors.rollout_engines.torch_engine import TorchEngine

        return TorchEngine(str(directory), dtype="float32", max_num_seqs=MAX_NUM_SEQS)
    pytest.importorskip("vllm")
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    return VllmEngine(
        str(directory),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=MAX_NUM_SEQS,
        seed=0,
        gpu_memory_fraction=0.2,
        kv_cache_gib=0.05,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=directory / "vllm.log",
        num_threads=1,
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, kind), id=f"{name}-{kind}", marks=[pytest.mark.slow] if name == "vllm" else [])
        for name in ("torch", "vllm")
        for kind in ("tied", "untied", "experts")
    ],
)
def engine_and_policy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutEngine, PreTrainedModel]]:
    """vLLM sets environment variables and replaces torch.set_num_threads: both are put back."""
    name, kind = request.param
    policy = random_policy(kind, seed=0)
    directory = tmp_path_factory.mktemp("model")
    write_config(policy, directory)
    with mock.patch.dict(os.environ), mock.patch.object(torch, "set_num_threads", torch.set_num_threads):
        engine = make_engine(name, directory)
        yield engine, policy
        engine.close()


@pytest.fixture
def policy(engine_and_policy: tuple[RolloutEngine, PreTrainedModel]) -> PreTrainedModel:
    return engine_and_policy[1]


@pytest.fixture
def engine(engine_and_policy: tuple[RolloutEngine, PreTrainedModel]) -> RolloutEngine:
    """With the policy's weights."""
    sync(*engine_and_policy)
    return engine_and_policy[0]
