"""One way to run a recipe in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import RunRecipe

import rlflow
from rlflow.recipe.yaml_source import merge
from tests.local_actors import use_local_actors


@pytest.fixture
def run_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunRecipe:
    use_local_actors(monkeypatch)

    def run(recipe: dict[str, Any], name: str = "run", *, resume: bool = False, **overrides: Any) -> Path:
        """Runs a recipe into ``tmp_path / name``, which it returns; ``a__b`` overrides the key a.b."""
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump(merge({"tracking": ["jsonl"], "run": {"output_dir": str(tmp_path / name)}}, recipe))
        )
        rlflow.run(path, overrides={key.replace("__", "."): value for key, value in overrides.items()}, resume=resume)
        return tmp_path / name

    return run
