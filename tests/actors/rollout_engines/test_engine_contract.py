"""What every rollout engine promises, held against transformers: the same tests for each engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.types import Completion, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from rlflow.actors.rollout_worker import RolloutEngine

TOLERANCE = 1e-4
VOCABULARY = 64
EOS = 1
MAX_NUM_SEQS = 8
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}


def random_policy(kind: str, *, seed: int) -> PreTrainedModel:
    """Weights large enough for distributions far from uniform.

    Args:
        kind: ``tied`` or ``untied`` embeddings, or ``experts``: a mixture of them in the first and the last layer.
    """
    make_config: Any = Qwen3MoeConfig if kind == "experts" else Qwen3Config
    config = make_config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3 if kind == "experts" else 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=kind == "tied",
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        **(EXPERTS if kind == "experts" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def write_config(policy: PreTrainedModel, directory: Path) -> None:
    """A model directory without weights, with a generation config that an engine must not heed."""
    policy.config.architectures = [type(policy).__name__]
    policy.config.save_pretrained(directory)
    GenerationConfig(
        do_sample=True, temperature=3.0, top_k=2, repetition_penalty=2.0, eos_token_id=EOS
    ).save_pretrained(directory)


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


def sent(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As a trainer names them."""
    return {name: tensor.detach() for name, tensor in to_checkpoint(policy, policy.named_parameters())}


def sync(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    """Read-only views into one buffer, as the trainer's weights arrive."""
    snapshot = pack_weights(sent(policy).items(), version=0)
    snapshot.buffer.flags.writeable = False
    engine.load_weights(unpack_weights(snapshot))


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


def make_requests(num_requests: int = 4, group_size: int = 4) -> list[GenerationRequest]:
    """Prompts of 3 to 60 tokens and seeds from both ends of 63 bits."""
    rng = np.random.default_rng(0)
    return [
        GenerationRequest(
            prompt_token_ids=rng.integers(2, VOCABULARY, size=3 + 19 * i % 58).astype(np.int32),
            seeds=tuple((2**63 - 1 - g if g % 2 else g) - i * 1000 * (-1) ** (g + 1) for g in range(group_size)),
        )
        for i in range(num_requests)
    ]


@torch.no_grad()
def reference_logprobs(
    policy: PreTrainedModel,
    prompt: np.ndarray,
    completion: Completion,
    *,
    temperature: float,
    top_k: int,
    left_out: Sequence[int] = (),
) -> np.ndarray:
    """A forward over prompt and completion, without cache: float32 [C]."""
    token_ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
    logits = policy(token_ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
    logits[:, list(left_out)] = -torch.inf
    if top_k:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits.log_softmax(-1).gather(1, token_ids[len(prompt) :, None]).squeeze(1).numpy()


def assert_logprobs_match(
    policy: PreTrainedModel,
    requests: list[GenerationRequest],
    completions: list[Completion],
    params: SamplingParams,
    left_out: Sequence[int] = (),
) -> None:
    prompts = [request.prompt_token_ids for request in requests for _ in request.seeds]
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference_logprobs(
            policy,
            prompt,
            completion,
            temperature=params.temperature or 1.0,
            top_k=params.top_k,
            left_out=left_out,
        )
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10),
        SamplingParams(max_new_tokens=24, temperature=0.0),
    ],
    ids=["plain", "temperature-and-top-k", "greedy"],
)
def test_logprobs_equal_a_transformers_forward(
    engine: RolloutEngine, policy: PreTrainedModel, params: SamplingParams
) -> None:
    requests = make_requests()
    assert_logprobs_match(policy, requests, engine.generate(requests, params), params)


def test_logprobs_follow_each_of_two_weight_syncs_in_a_row(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    requests = make_requests()
    params = SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10)
    engine.generate(requests, params)
    kind = "experts" if "moe" in policy.config.model_type else "tied" if policy.config.tie_word_embeddings else "untied"
    for seed in (1, 2):
        newer = random_policy(kind, seed=seed)
        sync(engine, newer)
        assert_logprobs_match(newer, requests, engine.generate(requests, params), params)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_new_tokens=24), SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10)],
    ids=["plain", "temperature-and-top-k"],
)
def test_ids_that_are_left_out_are_never_drawn_and_have_no_share_in_logprobs(
    engine: RolloutEngine, policy: PreTrainedModel, params: SamplingParams
) -> None:
    requests, left_out = make_requests(), np.array([7, *range(24, VOCABULARY)])
    before = engine.generate(requests, params)
    assert np.isin(np.concatenate([completion.token_ids for completion in before]), left_out).mean() > 0.2
    engine.leave_out(left_out)
    completions = engine.generate(requests, params)
    assert not np.isin(np.concatenate([completion.token_ids for completion in completions]), left_out).any()
    assert_logprobs_match(policy, requests, completions, params, left_out.tolist())
    engine.leave_out(np.array([], dtype=np.int64))
    for again, once in zip(engine.generate(requests, params), before, strict=True):
        np.testing.assert_array_equal(again.token_ids, once.token_ids)


def test_greedy_tokens_equal_transformers_generate(engine: RolloutEngine, policy: Any) -> None:
    requests = make_requests(group_size=1)
    completions = engine.generate(requests, SamplingParams(max_new_tokens=16, temperature=0.0))
    for request, completion in zip(requests, completions, strict=True):
        prompt = torch.from_numpy(request.prompt_token_ids).long()[None]
        expected = policy.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16, eos_token_id=[]
        )
        np.testing.assert_array_equal(completion.token_ids, expected[0, prompt.shape[1] :].numpy())


def test_the_same_batch_repeats_to_the_bit(engine: RolloutEngine) -> None:
    requests, params = make_requests(), SamplingParams(max_new_tokens=24)
    for first, second in zip(engine.generate(requests, params), engine.generate(requests, params), strict=True):
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_array_equal(first.logprobs, second.logprobs)


def test_seeds_tell_samples_of_a_prompt_apart(engine: RolloutEngine) -> None:
    request = GenerationRequest(np.array([5, 6, 7], dtype=np.int32), seeds=(0, 1, 2, 2**62, 2**63 - 1, 1))
    completions = engine.generate([request], SamplingParams(max_new_tokens=24))
    texts = [tuple(completion.token_ids) for completion in completions]
    assert len(set(texts)) == 5
    assert texts[1] == texts[5]


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(engine: RolloutEngine) -> None:
    requests, params = make_requests(), SamplingParams(max_new_tokens=24)
    together = engine.generate(requests, params)
    backwards = engine.generate([GenerationRequest(r.prompt_token_ids, r.seeds[::-1]) for r in requests[::-1]], params)
    alone = [
        engine.generate([GenerationRequest(request.prompt_token_ids, (seed,))], params)[0]
        for request in requests
        for seed in request.seeds
    ]
    for a, b, c in zip(together, backwards[::-1], alone, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.token_ids, c.token_ids)


def test_a_stop_token_ends_a_completion_and_stays_in_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    requests = make_requests()
    params = SamplingParams(max_new_tokens=12, stop_token_ids=(EOS, 20))
    completions = engine.generate(requests, params)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        is_stop = np.isin(completion.token_ids, params.stop_token_ids)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
    assert_logprobs_match(policy, requests, completions, params)


def test_nothing_but_the_given_stop_tokens_ends_a_completion(engine: RolloutEngine) -> None:
    completions = engine.generate(make_requests(), SamplingParams(max_new_tokens=48))
    assert [len(completion.token_ids) for completion in completions] == [48] * 16
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert any(EOS in completion.token_ids[:-1] for completion in completions)


def test_a_completion_has_at_least_one_token_and_plain_arrays(engine: RolloutEngine) -> None:
    params = SamplingParams(max_new_tokens=1, stop_token_ids=tuple(range(VOCABULARY)))
    for completion in engine.generate(make_requests(), params):
        assert completion.token_ids.shape == completion.logprobs.shape == (1,)
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.finish_reason == "stop"


def test_a_sync_with_an_unknown_name_names_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    weights = sent(policy) | {"model.layers.7.extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"model\.layers\.7\.extra\.weight"):
        engine.load_weights(weights.items())


def test_a_sync_with_another_shape_names_the_tensor_and_both_shapes(
    engine: RolloutEngine, policy: PreTrainedModel
) -> None:
    weights = sent(policy) | {"model.norm.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\(7,\).*\(64,\)"):
        engine.load_weights(weights.items())


def test_a_sync_that_leaves_a_weight_out_names_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    weights = sent(policy)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        engine.load_weights(weights.items())
