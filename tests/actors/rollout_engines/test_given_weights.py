"""Engines whose weights are there from the start: they serve a model that nobody trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlflow.actors.rollout_engines.engine import RolloutEngine, generate
from rlflow.actors.rollout_engines.torch_engine import GROUPED_SLOTS, TorchEngine
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.types import SamplingParams
from tests.actors.rollout_engines.engine_oracle import assert_logprobs_match, make_requests, random_policy, write_config

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def assert_generates_as_transformers(engine: RolloutEngine, policy: Any) -> None:
    requests = make_requests(GREEDY, group_size=1)
    completions = generate(engine, requests)
    for request, completion in zip(requests, completions, strict=True):
        prompt = torch.from_numpy(request.token_ids).long()[None]
        expected = policy.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=[]
        )
        np.testing.assert_array_equal(completion.token_ids, expected[0, prompt.shape[1] :].numpy())
    assert_logprobs_match({0: policy}, requests, completions)


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_a_torch_engine_of_a_model_that_has_its_weights_generates_at_once(kind: str, tmp_path: Path) -> None:
    policy, oracle = random_policy(kind, seed=0), random_policy(kind, seed=0)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=8, model=policy)
    assert_generates_as_transformers(engine, oracle)


def test_two_torch_engines_share_a_model_and_take_turns(tmp_path: Path) -> None:
    policy, oracle = random_policy("tied", seed=0), random_policy("tied", seed=0)
    engines = [TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=8, model=policy) for _ in range(2)]
    assert [engine.way for engine in engines] == [GROUPED_SLOTS] * 2
    assert engines[1].own_attention != GROUPED_SLOTS.attention
    requests = make_requests(GREEDY, group_size=1)
    for engine in engines:
        engine.add(requests)
    finished: list[dict[int, Any]] = [{}, {}]
    while any(engine.num_running + engine.num_waiting for engine in engines):
        for engine, ended in zip(engines, finished, strict=True):
            ended |= {completion.id: completion for completion in engine.step()}
            assert policy.config._attn_implementation == GROUPED_SLOTS.attention
    for ended in finished:
        assert_logprobs_match({0: oracle}, requests, [ended[request.id] for request in requests])


def write_adapter(policy: Any, base: Path, directory: Path) -> Any:
    """An adapter that changes what is written. Returns the policy with it, as PEFT reads it."""
    adapted: Any = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    return adapted.eval()


@pytest.mark.slow
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_vllm_engine_with_the_weights_of_its_directory_generates_at_once(tmp_path: Path, with_adapter: bool) -> None:
    pytest.importorskip("vllm")
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    policy: Any = random_policy("tied", seed=0)
    policy.save_pretrained(tmp_path)
    write_config(policy, tmp_path)
    adapted = None
    if with_adapter:
        policy = write_adapter(policy, tmp_path, tmp_path / "adapter")
        adapted = ModelBlock(path=str(tmp_path), adapter=AdapterBlock(path=str(tmp_path / "adapter")))
    with mock.patch.dict(os.environ), mock.patch.object(torch, "set_num_threads", torch.set_num_threads):
        engine = VllmEngine(
            str(tmp_path),
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            seed=0,
            gpu_memory_fraction=0.2,
            kv_cache_gib=0.05,
            tensor_parallel_size=1,
            trust_remote_code=False,
            log_path=tmp_path / "vllm.log",
            num_threads=1,
            adapted=adapted,
            is_whole=True,
        )
        assert_generates_as_transformers(engine, policy)
        engine.close()
