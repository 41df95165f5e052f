"""vLLM loads what is written: its likelihoods are transformers' of the same directory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlflow.cli.main import main
from rlflow.quantization.likelihood import by_vllm
from tests.conftest import _write_model

TOLERANCE = 0.05
"""Nats a token: both round activations, each where it likes, in bfloat16."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("name", ["fp8", "int8", "w4a16"])
def test_vllm_has_the_likelihoods_of_transformers(name: str, tmp_path: Path):
    source, output = tmp_path / "model", tmp_path / name
    _write_model(source, Qwen3Config, 0.15, hidden_size=64, tie_word_embeddings=True, num_hidden_layers=2)
    assert main(["export", str(source), str(output), "--quantize", name]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 60, (length,), generator=generator) for length in (40, 25, 12)]
    with torch.no_grad():
        expected = [model(ids[None], labels=ids[None]).loss.item() for ids in texts]
    sums = by_vllm(output, [ids.tolist() for ids in texts], trust_remote_code=False)
    found = [total / (len(ids) - 1) for total, ids in zip(sums, texts, strict=True)]
    assert found == pytest.approx(expected, abs=TOLERANCE)
    # Far from those of a model that knows nothing, which any broken one would come near.
    assert min(expected) > 0.2 + torch.tensor(float(model.config.vocab_size)).log()
