"""Experts in vLLM after two weight syncs, with the biases by which their routers choose, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from rlflow.actors.checkpoint_names import kept_buffers
from rlflow.actors.rollout_engines.vllm_engine import VllmEngine
from rlflow.types import SamplingParams
from tests.actors.rollout_engines.engine_oracle import (
    EOS,
    VOCABULARY,
    assert_logprobs_match,
    finish,
    make_requests,
    sync,
    write_config,
)

pytestmark = pytest.mark.slow


def policy(seed: int) -> Glm4MoeForCausalLM:
    """A dense layer and one of 8 experts, some of which its bias keeps from all tokens."""
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Glm4MoeForCausalLM(config).eval()
        ((_, bias),) = kept_buffers(model)
        bias.copy_(torch.randn(bias.shape))
    return model


def test_logprobs_are_those_of_transformers_with_each_version(tmp_path: Path):
    pytest.importorskip("vllm")
    policies = {version: policy(version) for version in range(2)}
    write_config(policies[0], tmp_path)
    engine = VllmEngine(
        str(tmp_path),
        dtype="float32",
        max_model_len=96,
        max_num_seqs=8,
        seed=0,
        gpu_memory_fraction=0.3,
        kv_cache_gib=0.1,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=tmp_path / "log",
        num_threads=1,
    )
    for version, model in policies.items():
        sync(engine, model, version)
        requests = make_requests(SamplingParams(max_new_tokens=12), group_size=2)
        engine.add(requests)
        finished = finish(engine)
        assert_logprobs_match(policies, requests, [finished[request.id] for request in requests])
    engine.close()
