"""Whatever an architecture makes of padding, the engine's logprobs are those of transformers' forward
pass of each sequence alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.rollout_engines.torch_reading import ONE_PROMPT, PaddedReading, read_padded
from rlflow.types import GenerationRequest, SamplingParams
from tests.actors.train_engines.architectures import LLAMA, MAMBA, ONE_AT_A_TIME, PACKED, VOCABULARY, write

PADDED = ["gpt2", "gemma3_text", "cohere2", "gemma2", "gpt_oss", "bloom", "stablelm", "llama4_text"]
UNPADDED = ["lfm2", "mamba", "granitemoehybrid", "qwen3_next"]


def engine_of(directory: Path, kind: str) -> TorchEngine:
    model = write(directory, kind, (PACKED | ONE_AT_A_TIME)[kind])
    engine = TorchEngine(str(directory), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, model.named_parameters()))
    return engine


def assert_right(engine: TorchEngine, directory: Path, kind: str) -> None:
    """Prompts of unlike lengths, some samples that end early, more rows than are generated at a time."""
    # transformers' default for Gemma 2 leaves out the cap on attention's logits.
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager" if kind == "gemma2" else None)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(2, VOCABULARY, n).astype(np.int32) for n in (3, 13, 8)]
    requests = [GenerationRequest(prompt, (i, 10 + i)) for i, prompt in enumerate(prompts)]
    params = SamplingParams(max_new_tokens=12, temperature=5.0, stop_token_ids=tuple(range(4, 14)))
    completions = engine.generate(requests, params)
    assert len({len(completion.token_ids) for completion in completions}) > 1
    for index, completion in enumerate(completions):
        prompt = prompts[index // 2]
        ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
        with torch.no_grad():
            logits = plain.eval()(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / 5.0
        expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).squeeze(1)
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", [*PADDED, *UNPADDED])
def test_logprobs_are_those_of_transformers_for_each_sequence_alone(tmp_path, kind):
    engine = engine_of(tmp_path, kind)
    assert engine.is_settled and (engine.reader is read_padded) == (kind in PADDED)
    assert_right(engine, tmp_path, kind)


def test_a_cache_that_forgets_is_found_and_left_out(tmp_path, monkeypatch):
    """Padding goes wrong, and so does a cache that loses what came before."""
    monkeypatch.setattr(PaddedReading, "keep", lambda self, rows: None)
    read = ONE_PROMPT[0].func._read  # pyright: ignore[reportFunctionMemberAccess]

    def forgetful(self, ids):
        read(self, ids)
        self.cache = {}

    monkeypatch.setattr(ONE_PROMPT[0].func, "_read", forgetful)  # pyright: ignore[reportFunctionMemberAccess]
    engine = engine_of(tmp_path, "gpt2")
    assert engine.reader is ONE_PROMPT[-1]
    assert_right(engine, tmp_path, "gpt2")


@pytest.mark.parametrize("read", [read_padded, *ONE_PROMPT], ids=["padded", "one prompt", "no cache"])
def test_logits_of_a_prompts_last_token_alone_are_held(tmp_path, read):
    model = write(tmp_path, "gpt2", PACKED["gpt2"])
    with torch.inference_mode():
        reading = read(model, [np.arange(2, 32, dtype=np.int32)], [0, 0])
        for _ in range(2):
            assert reading.logits.shape == (2, VOCABULARY)
            assert reading.logits.untyped_storage().nbytes() == 2 * VOCABULARY * 4
            reading.write(torch.tensor([3, 4]))


@pytest.mark.parametrize("kind", ["gpt2", "lfm2"])
def test_ids_that_are_left_out_before_the_weights_come_keep_nothing_from_being_settled(tmp_path, kind):
    model = write(tmp_path, kind, (PACKED | ONE_AT_A_TIME)[kind])
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.leave_out(np.array([VOCABULARY - 1]))
    engine.load_weights(to_checkpoint(model, model.named_parameters()))
    assert engine.is_settled and (engine.reader is read_padded) == (kind in PADDED)


def test_a_cache_that_is_wrong_is_found_once_the_weights_are_large_enough(tmp_path):
    """Of a new Bamba, whose cached numbers are not those of its forward pass."""
    config = LLAMA | MAMBA | {"attn_layer_indices": [1]}
    model = write(tmp_path, "bamba", {key: value for key, value in config.items() if key != "head_dim"})
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, ((name, p * 0.01) for name, p in model.named_parameters())))
    engine.load_weights(to_checkpoint(model, model.named_parameters()))
    assert_right(engine, tmp_path, "bamba")


def test_a_cache_that_is_wrong_is_found_where_one_token_has_nearly_all_of_the_probability(tmp_path):
    """Of RecurrentGemma, whose embeddings are scaled up: at temperature 1 what it writes has logprobs of 0."""
    config = LLAMA | {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8}
    model = write(tmp_path, "recurrent_gemma", config)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, model.named_parameters()))
    assert engine.reader is ONE_PROMPT[-1]
    assert_right(engine, tmp_path, "recurrent_gemma")


def test_weights_that_are_no_numbers_settle_nothing(tmp_path):
    model = write(tmp_path, "gpt2", PACKED["gpt2"])
    engine = TorchEngine(str(tmp_path), dtype="float32", max_num_seqs=4)
    engine.load_weights(to_checkpoint(model, ((name, p * float("nan")) for name, p in model.named_parameters())))
    assert not engine.is_settled
    engine.load_weights(to_checkpoint(model, model.named_parameters()))
    assert engine.is_settled and engine.reader is read_padded
