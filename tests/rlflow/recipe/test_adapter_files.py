"""Which names are those of one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.recipe.adapter_files import same_model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("org/Llama-8B", "/models/llama-8b"),
        ("/old/models/llama-8b", "/new/llama-8b"),
        ("/old/runs/sft_a/final", "/work/runs/sft_a/final"),
        ("/old/runs/quickstart/sft/final", "/work/quickstart/sft/final"),
        ("/old/llama/checkpoint-500", "/new/llama/checkpoint-500"),
        ("final", "final"),
    ],
)
def test_a_model_that_was_moved_is_the_same(one: str, other: str):
    assert same_model(one, other)
    assert same_model(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("org/llama-8b", "/models/llama-1b"),
        ("/old/runs/sft_a/final", "/work/runs/dpo_b/final"),
        ("/old/runs/quickstart/sft/final", "/work/runs/gsm8k/sft/final"),
        ("/old/llama/checkpoint-500", "/new/llama/checkpoint-900"),
        ("/old/a/checkpoint-500", "/new/b/checkpoint-500"),
        ("/old/a/checkpoints/step_000012", "/new/b/checkpoints/step_000012"),
        ("/old/a/initial_model", "/new/b/initial_model"),
        ("final", "/work/runs/dpo_b/final"),
    ],
)
def test_models_that_bear_the_same_common_name_are_not_the_same(one: str, other: str):
    assert not same_model(one, other)
    assert not same_model(other, one)


def test_directories_that_are_there_are_told_apart_by_where_they_are(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name / "llama").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "llama")
    assert not same_model(str(tmp_path / "a" / "llama"), str(tmp_path / "b" / "llama"))
    assert same_model(str(tmp_path / "link"), str(tmp_path / "a" / "llama"))
