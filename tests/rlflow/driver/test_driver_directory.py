"""Whose checkpoints a run that is resumed may take up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlflow.data.errors import DataError
from rlflow.driver.directory import prepare_directory
from rlflow.driver.resuming import Inputs
from rlflow.recipe import Recipe

NOTHING = Inputs({}, {}, {})


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "base")


def recipe_of(directory: Path, base: Path | str, adapter: dict[str, Any] | None, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "algorithm": {"name": "sft"},
            "run": {"output_dir": str(directory), "steps": 1},
            "data": {"train": {"path": "rows.jsonl"}},
            "model": {"path": str(base), "adapter": adapter, **model},
        }
    )


def start(recipe: Recipe) -> None:
    """As far as its first checkpoint."""
    prepare_directory(recipe, NOTHING, resume=False)
    (Path(recipe.run.output_dir) / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"rank": 8}, r"another model\.adapter\.rank \(was 4, is 8\): set the model block back"),
        ({"rank": 4, "alpha": 64.0}, r"model\.adapter\.alpha \(was 32\.0, is 64\.0\)"),
        ({"rank": 4, "rslora": True}, r"model\.adapter\.rslora \(was False, is True\)"),
        ({"rank": 4, "kind": "dora"}, r"model\.adapter\.kind \(was lora, is dora\)"),
        ({"rank": 4, "target_modules": ["q_proj"]}, r"target_modules \(was all-linear, is \['q_proj'\]\)"),
        ({"path": "/runs/a/final"}, r"path \(was None, is /runs/a/final\); model\.adapter\.rank \(was 4, is 16\)"),
    ],
    ids=str,
)
def test_another_adapter_is_refused(base: Path, tmp_path: Path, adapter: dict[str, Any], says: str):
    start(recipe_of(tmp_path / "run", base, {"rank": 4}))
    with pytest.raises(DataError, match=f"run has checkpoints of an adapter with .*{says}"):
        prepare_directory(recipe_of(tmp_path / "run", base, adapter), NOTHING, resume=True)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(base: Path, tmp_path: Path):
    other = shutil.copytree(base, tmp_path / "other")
    start(recipe_of(tmp_path / "run", base, {}))
    with pytest.raises(DataError, match=rf"another model\.path \(was {base}, is {other}\).*another run\.output_dir"):
        prepare_directory(recipe_of(tmp_path / "run", other, {}), NOTHING, resume=True)


def test_an_adapter_of_another_revision_of_its_base_is_refused(tmp_path: Path):
    start(recipe_of(tmp_path / "run", "org/base", {}, revision="v1"))
    with pytest.raises(DataError, match=r"another model\.revision \(was v1, is v2\)"):
        prepare_directory(recipe_of(tmp_path / "run", "org/base", {}, revision="v2"), NOTHING, resume=True)


def test_what_an_adapter_may_change_is_taken_up(base: Path, tmp_path: Path):
    given = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    start(recipe_of(tmp_path / "run", base, given))
    changes = {"target_modules": ["v_proj", "q_proj"], "dropout": 0.1, "lora_plus_ratio": 4.0}
    assert not prepare_directory(recipe_of(tmp_path / "run", base, given | changes), NOTHING, resume=True).is_new


def test_a_base_that_was_moved_is_the_same(base: Path, tmp_path: Path):
    start(recipe_of(tmp_path / "run", base, {}))
    (tmp_path / "elsewhere").mkdir()
    moved = base.rename(tmp_path / "elsewhere" / "base")
    assert not prepare_directory(recipe_of(tmp_path / "run", moved, {}), NOTHING, resume=True).is_new


def test_a_whole_model_may_start_from_another_of_the_same_shape(base: Path, tmp_path: Path):
    """Its checkpoints replace all weights."""
    other = shutil.copytree(base, tmp_path / "other")
    start(recipe_of(tmp_path / "run", base, None))
    assert not prepare_directory(recipe_of(tmp_path / "run", other, None), NOTHING, resume=True).is_new
