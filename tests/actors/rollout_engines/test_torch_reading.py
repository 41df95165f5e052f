"""Whatever an architecture makes of padding, the engine's logprobs are those of transformers' forward
pass of each sequence alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.rollout_engines import torch_slots
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.torch_engine import GROUPED_SLOTS, NO_CACHE, OWN_CACHE, SLOTS, TorchEngine, Way
from rlflow.actors.rollout_engines.torch_reading import UnpaddedReading
from rlflow.actors.rollout_engines.torch_slots import SlotReading
from rlflow.types import Completion, SampleRequest, SamplingParams
from tests.actors.train_engines.architectures import LLAMA, MAMBA, PACKED, PADDED, VOCABULARY, write

WAYS = {
    GROUPED_SLOTS: ["gpt2", "gemma3_text", "cohere2", "llama4_text"],
    SLOTS: ["gemma2", "gpt_oss", "bloom", "stablelm"],
    OWN_CACHE: ["lfm2", "mamba", "granitemoehybrid", "qwen3_next"],
}
PARAMS = SamplingParams(max_new_tokens=12, temperature=5.0, stop_token_ids=tuple(range(4, 14)))


def write_kind(directory: Path, kind: str, seed: int = 0) -> PreTrainedModel:
    return write(directory, kind, (PACKED | PADDED)[kind], seed)


def engine_of(directory: Path, kind: str, max_num_seqs: int = 4) -> TorchEngine:
    model = write_kind(directory, kind)
    engine = TorchEngine(str(directory), dtype="float32", max_num_seqs=max_num_seqs)
    engine.load_weights(to_checkpoint(model, model.named_parameters()), 0)
    return engine


def make_requests(params: SamplingParams = PARAMS) -> list[SampleRequest]:
    """Prompts of unlike lengths, two samples of each, more than are generated at a time."""
    generator = np.random.default_rng(1)
    prompts = [generator.integers(2, VOCABULARY, n).astype(np.int32) for n in (3, 13, 8)]
    return [SampleRequest(i, prompts[i // 2], i // 2 + 10 * (i % 2), params) for i in range(6)]


def plain_model(directory: Path, kind: str) -> PreTrainedModel:
    # transformers' default for Gemma 2 leaves out the cap on attention's logits.
    attention = "eager" if kind == "gemma2" else None
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()


@torch.no_grad()
def plain_logprobs(plain: Any, request: SampleRequest, token_ids: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([request.token_ids, token_ids])).long()
    logits = plain(input_ids=ids[None]).logits[0, len(request.token_ids) - 1 : -1] / request.params.temperature
    return logits.log_softmax(-1).gather(1, ids[len(request.token_ids) :, None]).squeeze(1).numpy()


def assert_right(engine: TorchEngine, directory: Path, kind: str) -> None:
    """Of completions some of which end early."""
    plain, requests = plain_model(directory, kind), make_requests()
    completions = generate(engine, requests)
    assert len({len(completion.token_ids) for completion in completions}) > 1
    for request, completion in zip(requests, completions, strict=True):
        expected = plain_logprobs(plain, request, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way, kinds in WAYS.items() for kind in kinds])
def test_logprobs_are_those_of_transformers_for_each_sequence_alone(tmp_path, way, kind):
    engine = engine_of(tmp_path, kind)
    assert engine.is_settled and engine.way is way
    assert_right(engine, tmp_path, kind)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama4_text", "bloom", "lfm2", "qwen3_next"])
def test_an_update_between_two_steps_goes_on_with_the_new_weights_whatever_the_cache(tmp_path, kind):
    """Windows, chunks, positions in the mask, states that are carried: all read again, with rows that come and go."""
    engine = engine_of(tmp_path, kind)
    models = [plain_model(tmp_path, kind), write_kind(tmp_path / "newer", kind, seed=1)]
    limits = (12, 3, 12, 5, 9, 12)
    requests = [
        replace(request, params=replace(PARAMS, max_new_tokens=limit, stop_token_ids=()))
        for request, limit in zip(make_requests(), limits, strict=True)
    ]
    engine.add(requests)
    finished: list[Completion] = []
    for _ in range(4):
        finished += engine.step()
    assert engine.load_weights(to_checkpoint(models[1], models[1].named_parameters()), 1) > 0
    while engine.num_running + engine.num_waiting:
        finished += engine.step()
    versions = {completion.id: completion.versions.tolist() for completion in finished}
    assert versions == {
        i: [0] * a + [1] * b for i, (a, b) in enumerate([(4, 8), (3, 0), (4, 8), (4, 1), (1, 8), (0, 12)])
    }
    for completion in finished:
        both = [plain_logprobs(model, requests[completion.id], completion.token_ids) for model in models]
        expected = np.where(completion.versions == 0, *both)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("few_keys", [0, 8192], ids=["in blocks", "at once"])
def test_rows_that_come_and_go_for_longer_than_columns_last_are_as_they_are_alone(tmp_path, monkeypatch, few_keys):
    """Prompts longer than what is written so far, columns laid out anew, and slots that are taken over."""
    monkeypatch.setattr(torch_slots, "_FEW_KEYS", few_keys)
    engine = engine_of(tmp_path, "llama", max_num_seqs=9)
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 25, 24)
    params = SamplingParams(max_new_tokens=30, temperature=5.0, stop_token_ids=(4, 5))
    requests = [
        SampleRequest(i, generator.integers(2, VOCABULARY, n).astype(np.int32), i, params)
        for i, n in enumerate(lengths)
    ]
    requests += [replace(request, id=24 + request.id, seed=24 + request.id) for request in requests[::3]]
    plain = plain_model(tmp_path, "llama")
    for request, completion in zip(requests, generate(engine, requests), strict=True):
        (alone,) = generate(engine, [request])
        np.testing.assert_array_equal(completion.token_ids, alone.token_ids)
        expected = plain_logprobs(plain, request, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=5e-5)


def test_a_prompt_is_read_once_for_as_long_as_one_of_its_samples_is_written(tmp_path, monkeypatch):
    engine = engine_of(tmp_path, "llama")
    read: list[int] = []
    read_texts = SlotReading._read
    monkeypatch.setattr(SlotReading, "_read", lambda self, texts: read.append(len(texts)) or read_texts(self, texts))
    prompt = np.array([5, 6, 7], dtype=np.int32)
    params = SamplingParams(max_new_tokens=8, temperature=5.0)
    lengths = (8, 2, 2, 2, 8, 8)
    requests = [SampleRequest(i, prompt, i, replace(params, max_new_tokens=n)) for i, n in enumerate(lengths)]
    together = generate(engine, requests)
    assert sum(read) == 1
    for request, completion in zip(requests, together, strict=True):
        np.testing.assert_array_equal(completion.token_ids, generate(engine, [request])[0].token_ids)


def test_a_text_of_the_same_bytes_in_other_numbers_is_another(tmp_path):
    model = write_kind(tmp_path, "llama")
    texts = [np.array([5, 7, 9], dtype=np.int64), np.array([5, 0, 7, 0, 9, 0], dtype=np.int32)]
    with torch.inference_mode():
        together, alone = SlotReading(model), SlotReading(model)
        for text in texts:
            together.add([text])
        alone.add(texts[1:])
        torch.testing.assert_close(together.logits()[1:], alone.logits())


def test_long_rows_lie_before_short_ones_when_some_end(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_slots, "_FEW_KEYS", 0)
    model = write_kind(tmp_path, "llama")
    with torch.inference_mode():
        reading = SlotReading(model, in_blocks=True)
        lengths = [20, 19, 18, 12, 11, 10, 7, 6, 5, 3, 2]
        reading.add([np.arange(2, 2 + n, dtype=np.int32) for n in lengths])
        assert [lengths[row] for row in reading.remove(np.array([1, 6]))] == [20, 12, 18, 6, 11, 10, 3, 2, 5]
        assert reading._blocks() == [(slice(0, 3), 0), (slice(3, 6), 9), (slice(6, 9), 15)]


def test_a_cache_that_forgets_is_found_and_left_out(tmp_path, monkeypatch):
    """Slots go wrong, and so does a cache that loses what came before."""
    monkeypatch.setattr(SlotReading, "_make_room", lambda self, num_more, longest: None)
    read = UnpaddedReading._read

    def forgetful(self, part):
        logits = read(self, part)
        part.cache = {}
        return logits

    monkeypatch.setattr(UnpaddedReading, "_read", forgetful)
    engine = engine_of(tmp_path, "gpt2")
    assert engine.way is NO_CACHE
    assert_right(engine, tmp_path, "gpt2")


@pytest.mark.parametrize("way", [SLOTS, OWN_CACHE, NO_CACHE], ids=lambda way: way.name)
def test_logits_of_a_prompts_last_token_alone_are_held(tmp_path, way: Way):
    model = write_kind(tmp_path, "gpt2")
    with torch.inference_mode():
        reading = way.reader(model)
        reading.add([np.arange(2, 32, dtype=np.int32)] * 2)
        for _ in range(2):
            logits = reading.logits()
            assert logits.shape == (2, VOCABULARY)
            assert logits.untyped_storage().nbytes() == 2 * VOCABULARY * 4
            reading.write(torch.tensor([3, 4]))


@pytest.mark.parametrize(("kind", "way"), [("gpt2", GROUPED_SLOTS), ("lfm2", OWN_CACHE)])
def test_ids_that_are_left_out_before_the_weights_come_keep_nothing_from_being_settled(tmp_path, kind, way):
    model = write_kind(tmp_path, kind)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.leave_out(np.array([VOCABULARY - 1]))
    engine.load_weights(to_checkpoint(model, model.named_parameters()), 0)
    assert engine.is_settled and engine.way is way


def test_a_cache_that_is_wrong_is_found_once_the_weights_are_large_enough(tmp_path):
    """Of a new Bamba, whose cached numbers are not those of its forward pass."""
    config = LLAMA | MAMBA | {"attn_layer_indices": [1]}
    model = write(tmp_path, "bamba", {key: value for key, value in config.items() if key != "head_dim"})
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, ((name, p * 0.01) for name, p in model.named_parameters())), 0)
    engine.load_weights(to_checkpoint(model, model.named_parameters()), 1)
    assert_right(engine, tmp_path, "bamba")


def test_a_cache_that_is_wrong_is_found_where_one_token_has_nearly_all_of_the_probability(tmp_path):
    """Of RecurrentGemma, whose embeddings are scaled up: at temperature 1 what it writes has logprobs of 0."""
    config = LLAMA | {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8}
    model = write(tmp_path, "recurrent_gemma", config)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, model.named_parameters()), 1)
    assert engine.way is NO_CACHE
    assert_right(engine, tmp_path, "recurrent_gemma")


def test_weights_that_are_no_numbers_settle_nothing(tmp_path):
    model = write_kind(tmp_path, "gpt2")
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, ((name, p * float("nan")) for name, p in model.named_parameters())), 0)
    assert not engine.is_settled
    engine.load_weights(to_checkpoint(model, model.named_parameters()), 1)
    assert engine.is_settled and engine.way is GROUPED_SLOTS
