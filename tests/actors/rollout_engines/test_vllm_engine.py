"""What is particular to the vLLM engine; test_engine_contract.py holds what all engines promise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma3nTextConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlflow.actors.rollout_engines import vllm_start
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.vllm_engine import VllmEngine
from rlflow.types import Completion, SampleRequest, SamplingParams

MAX_MODEL_LEN = 128
CACHE_TOKENS = 8448
CACHE_GIB = CACHE_TOKENS * 2 * 2 * 32 * 4 / 2**30
"""Of the tiny model: 2 layers, keys and values, 1 head of 32 float32."""


@pytest.fixture(scope="module", autouse=True)
def process_as_found() -> Iterator[None]:
    """vLLM sets environment variables and replaces torch.set_num_threads: both are put back."""
    with mock.patch.dict(os.environ), mock.patch.object(torch, "set_num_threads", torch.set_num_threads):
        yield


def start(model_dir: Path, **changes: Any) -> VllmEngine:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 96,
        "seed": 0,
        "gpu_memory_fraction": 0.2,
        "kv_cache_gib": CACHE_GIB,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "log_path": None,
        "num_threads": 1,
    }
    return VllmEngine(str(model_dir), **(settings | changes))


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[VllmEngine]:
    pytest.importorskip("vllm")
    engine = start(tiny_model_dir)
    engine.load_weights(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters(), 0)
    yield engine
    engine.close()


def make_requests(num_requests: int, prompt_tokens: int, params: SamplingParams) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(i, rng.integers(3, 60, size=prompt_tokens).astype(np.int32), i, params)
        for i in range(num_requests)
    ]


def assert_same_tokens(some: list[Completion], others: list[Completion]) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_without_vllm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed.*rlflow\[cpu\].*rollout\.engine: torch"):
        start(tmp_path)


def test_what_fails_within_vllm_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AttributeError("'SmolLM3Model' object has no attribute 'do_not_compile'")

    monkeypatch.setitem(sys.modules, "vllm", cast(Any, SimpleNamespace(EngineArgs=fail, LLM=None)))
    with pytest.raises(ValueError, match=r"vLLM fails on some/model \(AttributeError: .*rollout\.engine: torch"):
        vllm_start.start("some/model", {}, on_cpu=True, is_whole=False)


def test_a_model_that_vllm_does_not_have_is_a_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError(f"GPTNeoForCausalLM is not supported. Supported: {[f'Model{n}' for n in range(400)]}")

    monkeypatch.setitem(sys.modules, "vllm", cast(Any, SimpleNamespace(EngineArgs=refuse, LLM=None)))
    for is_whole, remedy in ((False, "rollout.engine: torch"), (True, "--engine torch")):
        with pytest.raises(ValueError, match=rf"GPTNeoForCausalLM is not supported.*; {remedy} runs") as raised:
            vllm_start.start("some/model", {}, on_cpu=True, is_whole=is_whole)
        assert len(str(raised.value)) < 900


@pytest.mark.slow
def test_a_max_model_len_beyond_the_models_is_refused_with_both_numbers(tiny_model_dir: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match=r"max_model_len \(9999\).*4096"):
        start(tiny_model_dir, max_model_len=9999)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Ernie4_5_MoeConfig(num_hidden_layers=2), "Ernie4_5_MoeForCausalLM's experts cannot be handed"),
        (Qwen3MoeConfig(moe_intermediate_size=24, num_experts=2), "its moe_intermediate_size is 24"),
        (DeepseekV3Config(num_hidden_layers=1), "latent attention"),
        (Gemma3nTextConfig(num_hidden_layers=2, num_kv_shared_layers=0), "leaves out the embeddings"),
        (Cohere2Config(num_hidden_layers=4, sliding_window=64), "longer than its sliding window, 64 tokens"),
    ],
    ids=["other experts", "narrow experts", "latent attention", "other logprobs", "another window"],
)
def test_a_model_that_vllm_reads_otherwise_is_refused(tmp_path: Path, config: Any, says: str) -> None:
    pytest.importorskip("vllm")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{says}.*rollout\.engine: torch"):
        start(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_tensor_parallelism_needs_gpus(tiny_model_dir: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2.*CPU"):
        start(tiny_model_dir, tensor_parallel_size=2)


def test_a_vllm_for_gpus_is_refused_in_a_worker_that_reserves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"set rollout\.gpus_per_worker: 1, or rollout\.engine: torch"):
        vllm_start.cuda_options(0.5, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert vllm_start.cuda_options(0.5, 1)["gpu_memory_utilization"] == 0.5


@pytest.mark.slow
def test_a_prompt_without_room_for_the_completion_is_named(engine: VllmEngine) -> None:
    params = SamplingParams(max_new_tokens=29)
    requests = [*make_requests(1, 8, params), replace(make_requests(1, 100, params)[0], id=7)]
    with pytest.raises(ValueError, match=r"request 7: 100 prompt tokens and 29 new ones exceed.*128"):
        engine.add(requests)
    assert engine.num_running + engine.num_waiting == 0


@pytest.mark.slow
def test_a_temperature_that_vllm_would_raise_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match=r"temperature 0\.001"):
        engine.add(make_requests(1, 4, SamplingParams(max_new_tokens=2, temperature=0.001)))


@pytest.mark.slow
def test_where_vllm_itself_refuses_a_request_none_is_taken(engine: VllmEngine) -> None:
    params = SamplingParams(max_new_tokens=2)
    requests = [*make_requests(2, 4, params), SampleRequest(2, np.array([], dtype=np.int32), 0, params)]
    with pytest.raises(ValueError, match=r"request 2: .*prompt"):
        engine.add(requests)
    assert engine.num_running + engine.num_waiting == 0
    assert [completion.id for completion in generate(engine, requests[:2])] == [0, 1]


@pytest.mark.slow
def test_requests_of_one_prompt_read_it_once_and_an_engine_with_nothing_under_way_has_forgotten_it(
    engine: VllmEngine,
) -> None:
    (request,) = make_requests(1, 100, SamplingParams(max_new_tokens=4))
    for _ in range(2):
        engine.add([request, replace(request, id=1)])
        engine.step()
        states = engine.llm.llm_engine.output_processor.request_states.values()
        assert [state.num_cached_tokens for state in states] == [0, 96], "in blocks of 32"
        while engine.num_running:
            engine.step()


@pytest.mark.slow
def test_a_batch_larger_than_the_cache_gets_the_tokens_of_its_parts(engine: VllmEngine) -> None:
    """Sequences are thrown out of the cache in mid-flight and read again; their random streams go on."""
    requests = make_requests(96, 20, SamplingParams(max_new_tokens=100))
    assert 96 * 20 < CACHE_TOKENS < 96 * 120
    parts = [generate(engine, requests[i : i + 32]) for i in range(0, 96, 32)]
    assert_same_tokens(generate(engine, requests), [completion for part in parts for completion in part])


@pytest.mark.slow
def test_more_prompt_tokens_than_one_step_reads_change_nothing(engine: VllmEngine) -> None:
    """vLLM would read the prompt at the boundary in two pieces."""
    requests = make_requests(64, 100, SamplingParams(max_new_tokens=4))
    step = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert step < 64 * 100
    assert step % 100 > 0
    parts = [generate(engine, requests[i : i + 8]) for i in range(0, 64, 8)]
    assert_same_tokens(generate(engine, requests), [completion for part in parts for completion in part])


@pytest.mark.slow
def test_an_engine_logs_to_its_file_and_prints_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    log_path = tmp_path / "vllm.log"
    script = f"""
from pathlib import Path
import numpy as np
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.vllm_engine import VllmEngine
from rlflow.types import SampleRequest, SamplingParams
disable_progress_bar()
engine = VllmEngine(
    {str(tiny_model_dir)!r}, dtype="float32", max_model_len=64, max_num_seqs=4, seed=0, gpu_memory_fraction=0.2,
    kv_cache_gib=0.01, tensor_parallel_size=1, trust_remote_code=False, log_path=Path({str(log_path)!r}), num_threads=1,
)
engine.load_weights(AutoModelForCausalLM.from_pretrained({str(tiny_model_dir)!r}).named_parameters(), 0)
request = SampleRequest(0, np.array([4, 5], dtype=np.int32), 1, SamplingParams(max_new_tokens=3))
assert len(generate(engine, [request])[0].token_ids) == 3
engine.sleep()
engine.wake()
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert "Initializing a V1 LLM engine" in log_path.read_text()
