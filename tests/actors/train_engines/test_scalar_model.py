"""Critic values and reward scores, held against a transformers classifier's own hidden states."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from rlflow.actors.train_engines.scalar_model import load_scalar_model
from rlflow.batching import pack
from rlflow.recipe import ModelBlock
from rlflow.types import Sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def module(tiny_model_dir):
    loaded = load_scalar_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=CPU)
    torch.nn.init.normal_(loaded.model.get_submodule("score").weight, generator=torch.Generator().manual_seed(0))
    return loaded


@pytest.fixture(scope="module")
def batch():
    """Two sequences packed together: 7 and 5 tokens, of which the last 3 and 2 are the completion."""
    generator = np.random.default_rng(0)
    samples = []
    for length, trained in ((7, 3), (5, 2)):
        mask = np.arange(length) >= length - trained
        tokens = generator.integers(2, 40, length).astype(np.int32)
        samples.append(Sample(tokens, mask, np.zeros(length, dtype=np.float32)))
    return pack(samples, max_tokens=64, num_ranks=1)[0][0]


@torch.no_grad()
def numbers_of(module, tokens: np.ndarray) -> torch.Tensor:
    """The head's number at each token of one sequence, by transformers alone."""
    model = module.model
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    attention, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.config._attn_implementation = attention
    return model.get_submodule("score")(hidden).squeeze(-1)


def test_the_value_of_a_token_is_the_number_of_the_token_before_it(module, batch):
    with torch.no_grad():
        values = module(batch, CPU, "values")
    for start, end in ((0, 7), (7, 12)) if batch.cu_seqlens[1] == 7 else ((0, 5), (5, 12)):
        numbers = numbers_of(module, batch.token_ids[start:end])
        expected = torch.cat([torch.zeros(1), numbers[:-1]]) * torch.from_numpy(batch.loss_mask[start:end])
        assert torch.allclose(values[start:end], expected, atol=1e-5)


def test_the_score_of_a_sequence_is_the_number_of_its_last_token(module, batch):
    with torch.no_grad():
        scores = module(batch, CPU, "scores")
    bounds = batch.cu_seqlens
    expected = [numbers_of(module, batch.token_ids[a:b])[-1] for a, b in pairwise(bounds)]
    assert torch.allclose(scores, torch.stack(expected), atol=1e-5)


def test_a_new_head_answers_zero(tiny_model_dir, batch):
    fresh = load_scalar_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=CPU)
    with torch.no_grad():
        assert not fresh(batch, CPU, "scores").any()


def test_a_classifier_of_several_labels_is_refused(tiny_model_dir, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        load_scalar_model(ModelBlock(path=str(tmp_path)), seed=0, device=CPU)


def test_a_trained_head_is_kept(module, tmp_path):
    module.model.config._attn_implementation = "sdpa"
    module.model.save_pretrained(tmp_path)
    again = load_scalar_model(ModelBlock(path=str(tmp_path)), seed=0, device=CPU)
    one, other = (m.model.get_submodule("score").weight for m in (module, again))
    assert torch.equal(one, other)
