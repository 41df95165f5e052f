"""ms-swift's reward functions and reward models as a recipe's rewards."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from rlflow.convert.given import Draft, Given
from rlflow.recipe.foreign.rows import as_list

REWARDS = {
    "accuracy": "math_accuracy",
    "format": "format",
    "react_format": "react_format",
    "cosine": "cosine",
    "repetition": "repetition",
    "soft_overlong": "soft_overlong",
}
"""ms-swift's built-in functions -> ours; docs/rewards.md says where they differ."""
ARGUMENTS = {
    "cosine": {
        "max_tokens": ("cosine_max_len", None),
        "wrong_short": ("cosine_min_len_value_wrong", -0.5),
        "wrong_long": ("cosine_max_len_value_wrong", 0.0),
        "correct_short": ("cosine_min_len_value_correct", 1.0),
        "correct_long": ("cosine_max_len_value_correct", 0.5),
    },
    "repetition": {"ngram_size": ("repetition_n_grams", 3), "max_penalty": ("repetition_max_penalty", -1.0)},
    "soft_overlong": {"max_tokens": ("soft_max_length", None), "cache_tokens": ("soft_cache_length", None)},
}
"""Our argument -> their flag and its default; None is max_completion_length."""


def reward_of(name: str, given: Given, draft: Draft) -> dict[str, Any]:
    """A function of --reward_funcs: ours, or the class that a plugin file registers under the name."""
    if name in REWARDS:
        args: dict[str, Any] = {}
        for ours, (flag, default) in ARGUMENTS.get(name, {}).items():
            value = given[flag]
            value = default if value is None else value
            longest = draft.values.get("rollout.max_new_tokens", 512)
            args[ours] = (longest if ours == "max_tokens" else longest // 4) if value is None else value
        if name == "soft_overlong" and "soft_cache_length" not in given:
            draft.note(
                "to do", "soft_overlong needs --soft_cache_length: a quarter of the longest completion is written"
            )
        if name == "cosine":
            args["clamp"] = False
        return {"name": REWARDS[name], **({"args": args} if args else {})}
    files = [str(file) for file in as_list(given["external_plugins"] or given["custom_register_path"])]
    for file in files:
        if (found := registered(Path(file), name)) is not None:
            return {"plugin": f"{file}:{found}", "label": name}
    draft.note(
        "to do",
        f"--reward_funcs {name}: write the class or function that is registered under this name behind the colon of "
        "rewards.plugin; its file must import without ms-swift (docs/from_ms_swift.md)",
    )
    return {
        "plugin": f"{files[0] if files else 'plugin.py'}:{name if name.isidentifier() else 'reward'}",
        "label": name,
    }


def registered(file: Path, name: str) -> str | None:
    """The class that a plugin file registers: ``orms['name'] = Class``."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=key))], value=ast.Name(id=found)) if (
                key == name
            ):
                return found
    return None


def reward_models(given: Given) -> list[dict[str, Any]]:
    paths = [str(path) for path in as_list(given["reward_model"])]
    labels = [{"label": f"reward_model_{number}"} for number in range(1, len(paths) + 1)]
    labels = labels if len(paths) > 1 else [{}] * len(paths)
    return [
        {"name": "reward_model", **label, "args": {"path": path}, "timeout_s": 60}
        for path, label in zip(paths, labels, strict=True)
    ]
