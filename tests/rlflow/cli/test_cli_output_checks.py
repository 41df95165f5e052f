"""Where a run is to write: what keeps it from that is told before anything starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rlflow.cli.preflight import load_checked
from rlflow.recipe import RecipeError

RECIPE = """\
algorithm: {name: sft}
model:
  architecture: {model_type: llama, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 2,
    num_attention_heads: 16}
  characters: "0123456789+="
data: {train: {generator: arithmetic}, max_tokens: 32}
run: {steps: 1}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problem_of(path: Path, *, alone: bool = False) -> str:
    with pytest.raises(RecipeError) as raised:
        load_checked(path, ["run.output_dir=a/b"], alone=alone)
    (problem,) = raised.value.problems
    return str(problem)


def test_a_directory_that_cannot_be_written_is_named(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    here = recipe_file.parent
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)) or False)
    assert problem_of(recipe_file) == (
        f"command line: run.output_dir: {here} is read-only, or not yours to write in: name another directory"
    )
    assert asked == [(here, os.W_OK | os.X_OK)]


def test_a_file_on_the_way_to_it_is_named(recipe_file: Path):
    (recipe_file.parent / "a").write_text("")
    assert "/a is a file: name a directory" in problem_of(recipe_file)


def test_a_disk_that_is_full_or_too_small_for_what_is_left_is_named(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    def has(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, free))

    has(1 << 20)
    assert f"the disk of {recipe_file.parent} is full: make room" in problem_of(recipe_file)
    # 34 million parameters of 12 bytes in a checkpoint and 4 in final/ are 0.50 GiB.
    has(400 << 20)
    assert load_checked(recipe_file, alone=False)
    assert "has 0.39 GiB left, and a checkpoint and the final model alone take" in problem_of(recipe_file, alone=True)
    has(2**30)
    assert load_checked(recipe_file, alone=True)
