"""Every recipe that is shipped fits on a page and says what it is; test_recipes_run.py runs each."""

from __future__ import annotations

from pathlib import Path

import pytest

DIRECTORY = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(DIRECTORY.rglob("*.yaml"))
MAX_LINES = 60


def test_recipes_are_shipped():
    assert DIRECTORY / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(DIRECTORY)))
def test_a_recipe_is_short_and_opens_with_what_it_shows(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[0].startswith("# ")
