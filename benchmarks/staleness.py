"""What staleness costs and saves on the quickstart's task: GRPO from one SFT model, once for each max_staleness.

    python benchmarks/staleness.py [--staleness 0 1 4] [--steps 200] [--output runs/staleness] [--picture FILE]

Trainer and rollout worker have one compute thread each. The SFT stage of recipes/quickstart.yaml is run once and kept;
every run starts from it with the same seed. Prints pass@1 on held-out sums by step, and seconds a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from rlflow.tracking.charts import standalone
from rlflow.tracking.history import Series

ROOT = Path(__file__).resolve().parents[1]
METRIC = "eval/heldout/pass@1"


def stages(output: Path) -> tuple[dict, dict]:
    """The two stages of the quickstart as recipes of their own, the second from the first's model."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    shared = {key: recipe[key] for key in ("rollout", "evaluation")}
    shared["rollout"]["cpus_per_worker"] = 1
    sft, grpo = recipe["stages"]
    for stage in (sft, grpo):
        stage.pop("name")
        stage["trainer"]["cpus_per_worker"] = 1
        stage["evaluation"] = {**shared["evaluation"], **stage.get("evaluation", {})}
        stage["rollout"] = shared["rollout"]
    sft |= {"model": recipe["model"], "run": {**sft["run"], "seed": 0, "output_dir": str(output / "sft")}}
    grpo |= {"model": {"path": str(output / "sft" / "final")}}
    return sft, grpo


def run(recipe: dict, output: Path) -> list[dict]:
    """Runs a recipe in a process of its own and returns its log's lines."""
    directory = Path(recipe["run"]["output_dir"])
    if not (directory / "final").exists():
        path = output / f"{directory.name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        subprocess.run([sys.executable, "-m", "rlflow", "run", str(path)], check=True, timeout=3600)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sft, grpo = stages(arguments.output)
    run(sft, arguments.output)
    curves = []
    for staleness in arguments.staleness:
        directory = str(arguments.output / f"staleness_{staleness}")
        block = {"seed": 0, "steps": arguments.steps, "max_staleness": staleness, "output_dir": directory}
        recipe = {**grpo, "run": {**block, "log_rollouts_every": 20}}
        lines = run(recipe, arguments.output)
        curve = {line["step"]: line[METRIC] for line in lines if METRIC in line}
        curves.append(Series(f"max_staleness {staleness}", tuple(curve.items())))
        seconds = [line["time/step_s"] - line.get("time/evaluate_s", 0.0) for line in lines if line["step"] > 1]
        ages = [line["staleness/mean"] for line in lines if "staleness/mean" in line]
        shown = "  ".join(f"{step}: {value:.3f}" for step, value in curve.items())
        print(
            f"max_staleness {staleness}: {statistics.median(seconds):.3f} s a step (median), tokens "
            f"{statistics.mean(ages):.2f} versions old; pass@1 {shown}",
            flush=True,
        )
    if arguments.picture:
        arguments.picture.write_text(standalone(curves))


if __name__ == "__main__":
    main()
