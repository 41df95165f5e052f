"""What the tests of rollout engines share: small random policies, requests, and what transformers computes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    RepetitionPenaltyLogitsProcessor,
)

from rlflow.actors.checkpoint_names import kept_buffers, to_checkpoint
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.types import Completion, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.engine import CacheAtUpdate, RolloutEngine

TOLERANCE = 1e-4
VOCABULARY = 64
EOS = 1
PIECES = [f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]
"""The text of each id."""
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


def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    """Ids to PIECES, which it joins without anything between."""
    backend = Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(PIECES)}, unk_token=PIECES[0]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def assert_ended_by_strings(
    completions: Sequence[Completion], undisturbed: Sequence[Completion], stop: Sequence[str]
) -> None:
    """Each is what was written without stop strings, up to the token that completes the first of them."""
    reasons = set()
    for completion, whole in zip(completions, undisturbed, strict=True):
        texts = ["".join(PIECES[id] for id in whole.token_ids[:size]) for size in range(len(whole.token_ids) + 1)]
        size = next((size for size, text in enumerate(texts) if any(end in text for end in stop)), None)
        np.testing.assert_array_equal(completion.token_ids, whole.token_ids[:size])
        np.testing.assert_allclose(completion.logprobs, whole.logprobs[:size], rtol=0, atol=TOLERANCE)
        assert completion.versions.shape == completion.token_ids.shape
        assert completion.finish_reason == ("length" if size is None else "stop")
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def kind_of(policy: PreTrainedModel) -> str:
    """As random_policy takes it."""
    if "moe" in policy.config.model_type:
        return "experts"
    return "tied" if policy.config.tie_word_embeddings else "untied"


def sent(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As a trainer names them."""
    return {
        name: tensor.detach()
        for name, tensor in to_checkpoint(policy, chain(policy.named_parameters(), kept_buffers(policy)))
    }


def sync(engine: RolloutEngine, policy: PreTrainedModel, version: int = 0, cache: CacheAtUpdate = "recompute") -> int:
    """Read-only views, as the trainer's weights arrive."""
    snapshot = pack_weights(sent(policy).items(), version)
    return engine.load_weights(unpack_weights(snapshot), version, cache)


def make_requests(
    params: SamplingParams, num_prompts: int = 4, group_size: int = 4, first_id: int = 0
) -> list[SampleRequest]:
    """Prompts of 3 to 60 tokens and seeds from both ends of 63 bits."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, size=3 + 19 * i % 58).astype(np.int32) for i in range(num_prompts)]
    seeds = [
        (2**63 - 1 - g if g % 2 else g) - i * 1000 * (-1) ** (g + 1)
        for i in range(num_prompts)
        for g in range(group_size)
    ]
    return [
        SampleRequest(first_id + index, prompts[index // group_size], seed, params) for index, seed in enumerate(seeds)
    ]


def finish(engine: RolloutEngine) -> dict[int, Completion]:
    """Steps until nothing is under way. What finished, by id."""
    finished: dict[int, Completion] = {}
    while engine.num_running + engine.num_waiting:
        finished |= {completion.id: completion for completion in engine.step()}
    return finished


@torch.no_grad()
def reference_logprobs(
    policies: Mapping[int, Any],
    request: SampleRequest,
    completion: Completion,
    cache: CacheAtUpdate = "recompute",
    left_out: Sequence[int] = (),
) -> np.ndarray:
    """What transformers computes with the policy of each token's version: float32 [C].

    Where the cache was kept, each policy goes on from the keys and values of the one before; else it reads everything.
    """
    params, num_prompt = request.params, len(request.token_ids)
    token_ids = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids])).long()[None]
    logits = torch.empty(len(completion.token_ids), VOCABULARY)
    starts = np.flatnonzero(np.diff(completion.versions, prepend=-1))
    kept, read = DynamicCache() if cache == "keep" else None, 0
    for start, end in pairwise([*starts.tolist(), len(completion.token_ids)]):
        policy = policies[int(completion.versions[start])]
        out = policy(token_ids[:, read : num_prompt + end - 1], past_key_values=kept, use_cache=kept is not None)
        logits[start:end] = out.logits[0, start - end :]
        read = num_prompt + end - 1 if cache == "keep" else 0
    logits[:, list(left_out)] = -torch.inf
    if params.repetition_penalty != 1:
        penalise = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        before = [token_ids[:, : num_prompt + i] for i in range(len(logits))]
        logits = torch.cat([penalise(text, row[None]) for text, row in zip(before, logits, strict=True)])
    logits = logits / (params.temperature or 1.0)
    if params.min_p and params.temperature:
        logits = MinPLogitsWarper(params.min_p)(token_ids, logits)
    if params.top_k:
        smallest = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits.log_softmax(-1).gather(1, token_ids[0, num_prompt:, None]).squeeze(1).numpy()


def assert_logprobs_match(
    policies: Mapping[int, Any],
    requests: Sequence[SampleRequest],
    completions: Sequence[Completion],
    cache: CacheAtUpdate = "recompute",
    left_out: Sequence[int] = (),
) -> None:
    for request, completion in zip(requests, completions, strict=True):
        assert completion.id == request.id
        expected = reference_logprobs(policies, request, completion, cache, left_out)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)


def assert_same_tokens(some: Sequence[Completion], others: Sequence[Completion]) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
