"""rlflow: one recipe, from a laptop to a cluster.

    import rlflow

    result = rlflow.run("recipe.yaml", overrides={"run.steps": 100}, callbacks=[lambda step, metrics: None])
    print(result.final, result.metrics["eval/heldout/pass@1"], result.series("reward/mean"))

Everything that is not an attribute of this module may change without notice. Nothing is loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlflow.callbacks import Answer, Callback, Outcome, StopTraining

if TYPE_CHECKING:
    from rlflow.api import plan, run
    from rlflow.data.errors import DataError
    from rlflow.driver.callbacks import CallbackError
    from rlflow.driver.errors import RunError, StoppedUnsaved, StopRequested
    from rlflow.planning import Plan
    from rlflow.plugins import PluginError
    from rlflow.recipe import Problem, Recipe, RecipeError, dump_recipe, load_recipe
    from rlflow.results import Result, read_result
    from rlflow.tracking.rollouts import RolloutRecord
    from rlflow.types import Group, Prompt, Rollout

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Callback",
    "CallbackError",
    "DataError",
    "Group",
    "Outcome",
    "Plan",
    "PluginError",
    "Problem",
    "Prompt",
    "Recipe",
    "RecipeError",
    "Result",
    "Rollout",
    "RolloutRecord",
    "RunError",
    "StopRequested",
    "StopTraining",
    "StoppedUnsaved",
    "dump_recipe",
    "load_recipe",
    "plan",
    "read_result",
    "run",
]

_MODULES = {
    "CallbackError": "rlflow.driver.callbacks",
    "DataError": "rlflow.data.errors",
    "Group": "rlflow.types",
    "Plan": "rlflow.planning",
    "PluginError": "rlflow.plugins",
    "Problem": "rlflow.recipe",
    "Prompt": "rlflow.types",
    "Recipe": "rlflow.recipe",
    "RecipeError": "rlflow.recipe",
    "Result": "rlflow.results",
    "Rollout": "rlflow.types",
    "RolloutRecord": "rlflow.tracking.rollouts",
    "RunError": "rlflow.driver.errors",
    "StopRequested": "rlflow.driver.errors",
    "StoppedUnsaved": "rlflow.driver.errors",
    "dump_recipe": "rlflow.recipe",
    "load_recipe": "rlflow.recipe",
    "plan": "rlflow.api",
    "read_result": "rlflow.results",
    "run": "rlflow.api",
}
"""Name -> the module that has it, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rlflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
