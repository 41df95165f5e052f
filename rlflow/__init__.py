"""rlflow: one recipe, from a laptop to a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None, *, resume: bool = False) -> None:
    """Runs a recipe, as ``rlflow run`` does.

    Args:
        recipe: A YAML file.
        overrides: Dotted keys to values, e.g. ``{"trainer.learning_rate": 2e-6}``.
        resume: Go on from the newest checkpoint in ``run.output_dir``.

    Raises:
        RecipeError, DataError: The recipe or the data is wrong; nothing was started.
        StopRequested: Somebody asked the run to stop; it can be resumed.
        RunError: The run failed.
    """
    from rlflow.cli.preflight import load_runnable
    from rlflow.cli.run import run as run_stages

    run_stages(load_runnable(recipe, overrides or {}), resume=resume)
