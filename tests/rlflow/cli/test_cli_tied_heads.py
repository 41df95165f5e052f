"""An adapter on the embeddings or the head where one matrix is both: merged, it is what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlflow.cli.main import main

IDS = torch.arange(2, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_merging_gives_the_head_a_matrix_of_its_own(tiny_model_dir: Path, tmp_path: Path, targets: list[str]):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=5e-5)
    assert not merged.config.tie_word_embeddings
