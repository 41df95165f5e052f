"""A reward model is served as it was trained: transformers and the reward measure what the run itself measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import RunRecipe, metrics_of
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    pipeline,
)

from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.rewards.reward_model import RewardModel

LETTERS = "bcdfghjklm?"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MEASURE = "eval/heldout/preference/"


def make_model(directory: Path, pad: str | None, special: list[str], spare_rows: int) -> None:
    tokenizer = build_character_tokenizer(LETTERS, TEMPLATE)
    if pad != "<pad>":
        # Its pad is the beginning of a text instead, which nothing has here.
        backend = tokenizer.backend_tokenizer.to_str().replace("<pad>", "<bos>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<eos>")
        tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = pad
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def make_pairs() -> list[dict[str, str]]:
    """Of one prompt, answers of one to six letters: which ends first is better."""
    random = np.random.default_rng(0)

    def word(length: int) -> str:
        return "".join(random.choice(list(LETTERS[:-1]), length))

    pairs = []
    for _ in range(24):
        short = int(random.integers(1, 4))
        pairs.append({"prompt": word(5) + "?", "chosen": word(short), "rejected": word(short + 3)})
    return pairs


def served(final: Path, texts: list[str], side: str) -> list[float]:
    """Scores of batches of 8 by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(final, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float32).eval()
    scores: list[float] = []
    for first in range(0, len(texts), 8):
        batch = tokenizer(texts[first : first + 8], padding=True, add_special_tokens=False, return_tensors="pt")
        assert (batch.attention_mask == 0).any()
        with torch.no_grad():
            scores += model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()
    return scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pad", "special", "spare_rows", "expected"),
    [
        ("<eos>", [], 0, "<|pad|>"),
        ("<eos>", [], 5, "<|pad|>"),
        (None, ["<think>", "<|reserved_0|>"], 0, "<|reserved_0|>"),
        ("<pad>", [], 0, "<pad>"),
    ],
    ids=["eos and no row to spare", "eos and padded rows", "none and a reserved token", "its own"],
)
def test_scores_and_accuracy_are_those_that_the_run_measured_whatever_the_padding(
    tmp_path: Path, run_recipe: RunRecipe, pad: str | None, special: list[str], spare_rows: int, expected: str
):
    make_model(tmp_path / "model", pad, special, spare_rows)
    pairs = make_pairs()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "algorithm": {"name": "reward_model"},
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": {"path": str(tmp_path / "pairs.jsonl")}, "prompts_per_step": 24, "max_tokens": 64},
        "evaluation": {"data": {"path": str(tmp_path / "pairs.jsonl")}},
        "trainer": {"learning_rate": 1.0e-3},
        "run": {"steps": 3},
    }
    directory = run_recipe(recipe)
    final = directory / "final"
    config = json.loads((final / "config.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token == expected
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < config["vocab_size"]

    measured = metrics_of(directory)[-1]
    sides = ("chosen", "rejected")
    texts = {side: [f"{pair['prompt']}{pair[side]}<eos>" for pair in pairs] for side in sides}
    classify: Any = pipeline("text-classification", str(final), function_to_apply="none", batch_size=8)
    reward = RewardModel(path=str(final), batch_size=8)
    prompts = [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]
    ways = {
        "right": {side: served(final, texts[side], "right") for side in sides},
        "left": {side: served(final, texts[side], "left") for side in sides},
        "pipeline": {side: [row["score"] for row in classify(texts[side])] for side in sides},
        "reward": {side: reward(prompts, [pair[side] for pair in pairs], [[]] * len(pairs)) for side in sides},
    }
    for way, scores in ways.items():
        margins = np.array(scores["chosen"]) - np.array(scores["rejected"])
        assert np.mean(margins > 0) == pytest.approx(measured[f"{MEASURE}accuracy"], abs=1e-6), way
        assert np.mean(margins) == pytest.approx(measured[f"{MEASURE}margin"], abs=1e-5), way
    assert 0.5 < measured[f"{MEASURE}accuracy"] <= 1.0
