"""Adapters on bases that are rounded to eight bits as they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_adapters import micro_batch, parts, train, trainer_of

from rlflow.actors import adapters, quantized_bases
from rlflow.recipe import AdapterBlock


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "torchao_int8"])
def test_an_adapter_trains_on_a_base_of_eight_bits(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: Any):
    package = quantized_bases.QUANTIZED_BASES[kind].package
    pytest.importorskip(package)
    monkeypatch.setattr(adapters, "check_quantized", lambda kind: None)
    trainer = trainer_of(tiny_model_dir, AdapterBlock(rank=4, quantize=kind))
    model = trainer.module.model
    assert quantized_bases.in_few_bits(parts(model)[0]) and not quantized_bases.in_few_bits(model.lm_head.weight)
    batch = micro_batch(5)
    before = trainer.logprobs([batch])
    train(trainer)
    assert np.abs(trainer.logprobs([batch]) - before).max() > 1e-3
    np.testing.assert_array_equal(trainer.reference_logprobs([batch]), before)
    # What else is computed with a text does not change it: the second of two says the same alone.
    alone = replace(
        batch,
        **{name: getattr(batch, name)[10:] for name in ("token_ids", "position_ids", "loss_mask", "loss_weights")},
        cu_seqlens=np.array([0, 14], dtype=np.int32),
        sample_indices=np.zeros(1, dtype=np.int32),
        labels=np.zeros(1, dtype=np.float32),
    )
    np.testing.assert_allclose(trainer.logprobs([alone]), trainer.logprobs([batch])[-14:], rtol=0, atol=2e-4)
