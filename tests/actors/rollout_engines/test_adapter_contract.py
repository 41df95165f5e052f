"""Engines that hold an adapter: what they generate is what PEFT computes, before and after every sync."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlflow.actors import adapters, quantized_bases
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.types import SamplingParams
from tests.actors.rollout_engines.engine_oracle import assert_logprobs_match, finish, make_requests, random_policy

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.engine import RolloutEngine

PARAMS = SamplingParams(max_new_tokens=16, temperature=0.7)


def make_engine(name: str, block: ModelBlock) -> RolloutEngine:
    assert block.path is not None
    common: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "adapted": block}
    if name == "torch":
        return TorchEngine(block.path, **common)
    pytest.importorskip("vllm")
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    return VllmEngine(
        block.path,
        max_model_len=128,
        seed=0,
        gpu_memory_fraction=0.2,
        kv_cache_gib=0.05,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=Path(block.path) / "vllm.log",
        num_threads=1,
        **common,
    )


class Policy:
    """The trainer's side: a base with an adapter, and PEFT's own view of it."""

    def __init__(self, block: ModelBlock, directory: Path) -> None:
        self.block, self.directory = block, directory
        self.model = adapters.load_adapted(block, seed=0, device=torch.device("cpu"))
        self.start = {name: p.detach().clone() for name, p in adapters.adapter_parameters(self.model).items()}

    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapters.adapter_parameters(self.model).items():
                is_length = ".lora_magnitude_vector." in name
                start = self.start[name] if is_length else torch.zeros(())
                parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))

    def send_to(self, engine: RolloutEngine, version: int = 0) -> int:
        """Returns the bytes that travelled."""
        snapshot = pack_weights(adapters.adapter_parameters(self.model).items(), version)
        engine.load_weights(unpack_weights(snapshot), version)
        return snapshot.num_bytes

    def as_peft_reads_it(self) -> Any:
        adapters.write(self.directory, self.model, adapters.adapter_parameters(self.model).items())
        assert self.block.path is not None
        adapter = self.block.adapter
        assert adapter is not None
        is_quantized = adapter.quantize == "nf4"
        quantized = {"quantization_config": quantized_bases.quantized("nf4", torch.float32)} if is_quantized else {}
        base = AutoModelForCausalLM.from_pretrained(self.block.path, **quantized)
        if quantized:
            # Plain matrices of the numbers that four bits stand for: no CPU has a kernel of its own for them.
            base = base.dequantize()
        return PeftModel.from_pretrained(base, str(self.directory)).eval()


ALL = AdapterBlock(rank=4, alpha=8)
KINDS = {
    "torch": ("torch", ALL),
    "torch-dora": ("torch", AdapterBlock(kind="dora", rank=4, alpha=8)),
    "torch-some": ("torch", AdapterBlock(rank=3, alpha=8, rslora=True, target_modules=["q_proj", "down_proj"])),
    "torch-nf4": ("torch", AdapterBlock(rank=4, alpha=8, quantize="nf4")),
    "vllm": ("vllm", ALL),
    "vllm-some": ("vllm", AdapterBlock(rank=3, alpha=8, rslora=True, target_modules=["q_proj", "down_proj"])),
}

QUICK = ("torch", "torch-dora")
"""Those of the quick round."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(value, id=key, marks=[pytest.mark.slow] * (key not in QUICK)) for key, value in KINDS.items()],
)
def engine_and_policy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutEngine, Policy]]:
    """vLLM sets environment variables and replaces torch.set_num_threads: both are put back."""
    name, adapter = request.param
    base = random_policy("tied", seed=0)
    directory = tmp_path_factory.mktemp("base")
    base.config.architectures = ["Qwen3ForCausalLM"]
    base.save_pretrained(directory)
    block = ModelBlock(path=str(directory), adapter=adapter)
    if adapter.quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    # Four bits are refused without a GPU for being slow there, not wrong.
    allowed = mock.patch.object(adapters, "check_quantized")
    threads = mock.patch.object(torch, "set_num_threads", torch.set_num_threads)
    with mock.patch.dict(os.environ), threads, allowed:
        engine = make_engine(name, block)
        yield engine, Policy(block, tmp_path_factory.mktemp("adapter"))
        engine.close()


@pytest.mark.slow
def test_logprobs_are_those_of_peft_after_every_sync(engine_and_policy: tuple[RolloutEngine, Policy]) -> None:
    engine, policy = engine_and_policy
    requests = make_requests(PARAMS)
    seen = set()
    for seed in (None, 1, 2, 1):
        if seed is not None:
            policy.change(seed)
        policy.send_to(engine)
        completions = generate(engine, requests)
        assert_logprobs_match({0: policy.as_peft_reads_it()}, requests, completions)
        seen.add(tuple(int(token) for completion in completions for token in completion.token_ids))
    assert len(seen) == 3, "the version that came twice generates the same, the others do not"


def test_completions_under_way_go_on_with_the_new_adapter_alone(
    engine_and_policy: tuple[RolloutEngine, Policy],
) -> None:
    engine, policy = engine_and_policy
    requests = make_requests(PARAMS)
    policies = {}
    for version in (4, 5):
        policy.change(version)
        policies[version] = policy.as_peft_reads_it()
        policy.send_to(engine, version)
        if version == 4:
            engine.add(requests)
            for _ in range(6):
                engine.step()
    finished = finish(engine)
    completions = [finished[request.id] for request in requests]
    assert [completion.versions.tolist() for completion in completions[:8]] == [[4] * 6 + [5] * 10] * 8
    assert_logprobs_match(policies, requests, completions)


def test_only_the_adapter_travels(engine_and_policy: tuple[RolloutEngine, Policy]) -> None:
    engine, policy = engine_and_policy
    adapter = sum(p.numel() * p.element_size() for p in adapters.adapter_parameters(policy.model).values())
    assert adapter <= policy.send_to(engine) <= 1.01 * adapter


def test_a_sync_of_another_adapter_names_what_is_wrong(engine_and_policy: tuple[RolloutEngine, Policy]) -> None:
    engine, policy = engine_and_policy
    weights = dict(adapters.adapter_parameters(policy.model))
    name = next(key for key in weights if "q_proj.lora_A" in key)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A.*\(7,\)"):
        engine.load_weights([*weights.items(), (name, torch.zeros(7))], 1)
    del weights[name]
    with pytest.raises(ValueError, match=r"1 parameters were not sent.*q_proj\.lora_A"):
        engine.load_weights(weights.items(), 1)
