"""A model with more rows in its embedding than its tokenizer has tokens: nobody gives the others a probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import RunRecipe, metrics_of

from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.tracking.rollouts import read_rollouts

TOKENS, ROWS = 14, 64


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=ROWS,
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
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = build_character_tokenizer("0123456789+=")
    assert len(tokenizer) == TOKENS
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_rollouts_are_of_tokens_alone_and_engine_trainer_and_reference_agree_on_them(
    model_dir: Path, run_recipe: RunRecipe
):
    recipe = {
        "algorithm": {"name": "grpo", "group_size": 4, "kl": {"coef": 0.1}},
        "model": {"path": str(model_dir)},
        "data": {"train": {"generator": "arithmetic"}, "prompts_per_step": 4, "max_prompt_tokens": 16},
        "rewards": [{"name": "repetition", "args": {"unit": "tokens", "ngram_size": 1}}],
        "rollout": {"engine": "torch", "max_new_tokens": 6},
        "run": {"steps": 1},
    }
    directory = run_recipe(recipe)
    ids = np.concatenate([row.token_ids for row in read_rollouts(directory / "rollouts" / "step_000001.parquet")])
    assert len(ids) > 50 and ids.max() < TOKENS
    step = metrics_of(directory)[-1]
    assert abs(step["kl/ref"]) < 1e-6
    assert step["mismatch/logprob_abs_diff"] < 1e-5
    assert step["entropy"] < np.log(TOKENS)
