"""What the tests of conversion share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.convert import Conversion, convert
from rlflow.recipe import Recipe, load_recipe


@pytest.fixture
def converted(tmp_path: Path):
    """From a command line to its recipe, as the file that is written loads, and the conversion."""

    def of(command: str) -> tuple[Recipe, Conversion]:
        [conversion] = convert(command)
        assert conversion.recipe is not None
        path = tmp_path / "recipe.yaml"
        path.write_text(conversion.recipe)
        [recipe] = load_recipe(path)
        return recipe, conversion

    return of
