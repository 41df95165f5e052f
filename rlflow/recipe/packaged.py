"""The recipes that come with rlflow, wherever it is installed."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name -> file, by name."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.yaml"))}


def packaged_recipe(name: str) -> Path | None:
    """The file of a name, with or without ``.yaml``; None for any other name, and for a path."""
    return packaged_recipes().get(name.removesuffix(".yaml"))
