"""Whole runs that measure from another adapter: the losses that two PEFT models beside each other give by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import RunRecipe, metrics_of
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA, WEIGHT = 1.0, 2.0
"""Of the losses, and of what is desirable in KTO's."""
PROMPTS, ANSWERS = ("Say one.", "Say two."), ("one one", "no")


def write_adapter(base: Path, directory: Path, seed: int, **fields: Any) -> Any:
    """PEFT's model with an adapter of random weights, which is also in the directory."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**fields)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(directory))
    return model


@torch.no_grad()
def log_ratio(policy: Any, reference: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """By how much the policy rather writes an answer, its end included, than the reference."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    first = len(tokenizer(text).input_ids)
    ids = torch.tensor([tokenizer(f"{text}{answer}{tokenizer.eos_token}").input_ids])
    of_policy, of_reference = (
        model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[first - 1 :].sum()
        for model in (policy, reference)
    )
    return of_policy - of_reference


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_run_measures_from_the_adapter_that_is_its_reference(
    name: str, tiny_model_dir: Path, tmp_path: Path, run_recipe: RunRecipe
):
    policy = write_adapter(tiny_model_dir, tmp_path / "mine", 0, r=4, target_modules=["q_proj", "v_proj"])
    reference = write_adapter(tiny_model_dir, tmp_path / "theirs", 1, r=2, target_modules=["q_proj", "up_proj"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def ratio(prompt: int, answer: int) -> torch.Tensor:
        return log_ratio(policy, reference, tokenizer, PROMPTS[prompt], ANSWERS[answer])

    if name == "dpo":
        rows = [
            {"prompt": prompt, "chosen": ANSWERS[index], "rejected": ANSWERS[1 - index]}
            for index, prompt in enumerate(PROMPTS)
        ]
        margins = torch.stack([ratio(index, index) - ratio(index, 1 - index) for index in range(2)])
        expected = -logsigmoid(BETA * margins).mean()
    else:
        rows = [
            {"prompt": prompt, "completion": answer, "label": index == 0}
            for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        ]
        # Each prompt with the other's answer (arXiv 2402.01306, section 4.1).
        kl = torch.stack([ratio(0, 1), ratio(1, 0)]).mean().clamp(min=0)
        desirable, undesirable = (
            (1 - (BETA * (ratio(0, 0) - kl)).sigmoid()),
            (1 - (BETA * (kl - ratio(1, 1))).sigmoid()),
        )
        expected = (WEIGHT * desirable + undesirable) / 2
        assert kl > 1
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"beta": BETA} | ({"desirable_weight": WEIGHT} if name == "kto" else {})
    recipe = {
        "algorithm": {"name": name, "preference": block},
        "model": {"path": str(tiny_model_dir), "adapter": {"path": str(tmp_path / "mine")}},
        "reference": {"adapter": str(tmp_path / "theirs")},
        "data": {"train": {"path": str(data)}, "prompts_per_step": 2, "max_tokens": 64},
        "evaluation": {"data": {"path": str(data)}},
        "trainer": {"learning_rate": 1.0e-2, "tokens_per_micro_batch": 64},
        "run": {"steps": 2},
    }
    before, *_, after = metrics_of(run_recipe(recipe))
    key = "eval/heldout/loss/" + ("kto" if name == "kto" else "preference")
    assert abs(expected.item() - {"dpo": math.log(2), "kto": (WEIGHT + 1) / 4}[name]) > 1e-2
    assert before[key] == pytest.approx(expected.item(), abs=2e-5)
    assert after[key] < before[key]
