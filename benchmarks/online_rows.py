"""Does every online row learn? From one SFT checkpoint of the quickstart's policy, the same budget for each row.

    python benchmarks/online_rows.py runs/online_rows            # all rows, about 25 minutes on 2 cores
    python benchmarks/online_rows.py runs/online_rows gspo ppo   # some

Two optimizer updates a rollout batch, so that ratios and clips are at work. The table goes to standard output and to
DIRECTORY/table.md; benchmarks/online_rows.md is a copy of one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import rlflow
from rlflow.recipe.presets import ALGORITHMS

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
COMPLETIONS, STEPS = 512, 100
METRIC = "eval/heldout/pass@1"


def main(directory: Path, rows: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    start = directory / "sft" / "final"
    if not start.exists():
        run(directory / "sft.yaml", starting_point(directory / "sft"))
    lines = ["| row | completions a step | before | after | gain | s a step |", "|---|---|---|---|---|---|"]
    for name in rows:
        recipe = recipe_of(name, start, directory / name)
        run(directory / f"{name}.yaml", recipe)
        steps = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        before, after = steps[0][METRIC], steps[-1][METRIC]
        seconds = sorted(step["time/step_s"] for step in steps[1:])[len(steps) // 2]
        prompts = recipe["data"]["prompts_per_step"]
        batch = f"{prompts} x {COMPLETIONS // prompts}"
        gain = f"{100 * (after - before):+.1f}"
        lines.append(f"| {name} | {batch} | {100 * before:.1f}% | {100 * after:.1f}% | {gain} | {seconds:.2f} |")
        (directory / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def starting_point(output: Path) -> dict[str, Any]:
    """The quickstart's SFT stage alone."""
    recipe = yaml.safe_load(QUICKSTART.read_text())
    stage = recipe.pop("stages")[0]
    del stage["name"]
    recipe["evaluation"] |= stage.pop("evaluation")
    return recipe | stage | {"run": {**stage["run"], "output_dir": str(output), "seed": 0}}


def recipe_of(name: str, start: Path, output: Path) -> dict[str, Any]:
    """The quickstart's GRPO stage with another row: its own defaults, KL coefficients included."""
    recipe = yaml.safe_load(QUICKSTART.read_text())
    stage = recipe.pop("stages")[1]
    grouped = "group_size" in ALGORITHMS[name].defaults
    algorithm: dict[str, Any] = {"name": name, "groups": {"updates_per_step": 2}}
    if ALGORITHMS[name].defaults["advantage"]["estimator"] == "gae":
        algorithm["critic"] = {"learning_rate": 5.0e-4, "warmup_steps": 5}
    return {
        "run": {"output_dir": str(output), "seed": 0, "steps": STEPS, "log_rollouts_every": STEPS},
        "model": {"path": str(start)},
        "algorithm": algorithm,
        "rollout": recipe["rollout"],
        "evaluation": recipe["evaluation"],
        "data": stage["data"] | {"prompts_per_step": COMPLETIONS // 8 if grouped else COMPLETIONS},
        "rewards": stage["rewards"],
        "trainer": stage["trainer"],
    }


def run(path: Path, recipe: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    started = time.perf_counter()
    rlflow.run(path)
    print(f"{path.stem}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    online = [name for name, row in ALGORITHMS.items() if row.family == "online"]
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or online)
