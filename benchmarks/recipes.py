"""Does every recipe of SmolLM2 run, with the real model on real data? Some small steps of each, one after the other.

    python benchmarks/recipes.py models/SmolLM2-135M-Instruct gsm8k/ harmless-base.jsonl.gz alpaca.json

The arguments: the model's directory; a directory with GSM8K's own train.jsonl and example_model_solutions.jsonl
(https://github.com/openai/grade-school-math); pairs of https://github.com/anthropics/hh-rlhf; instructions in alpaca's
columns. Some 25 minutes on 2 cores. On GSM8K a third reward, for short answers, joins the recipe's two: the model
solves nothing within so few tokens, and equal rewards are no gradient. The table goes to standard output as it grows;
benchmarks/recipes.md is a copy of one. Ends with 1 when a recipe failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlflow.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS = 2
TIMEOUT_S = 600.0
# A directory of files has neither configurations nor splits.
LOCAL = ["data.train.subset=null", "data.train.split=train"]
# Generation takes most of the time; only its length is cut.
SMALL = ["data.prompts_per_step=2", "rollout.max_new_tokens=32", "evaluation=null", "run.save_every=null"]
REWARDS = [
    {"name": "math_accuracy", "weight": 1.0},
    {"name": "answer_format", "weight": 0.1},
    {"plugin": f"{Path(__file__).parent / 'brevity.py'}:brevity", "weight": 1.0},
]
SHOWN = ("loss/total", "loss/policy", "loss/sft", "loss/kto", "loss/reward_model", "loss/value")
COLUMNS = "| recipe | engine | loss, step 1 and 2 | reward | gradient norm | engine against trainer | whole run, s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("instructions", type=Path)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="names without .yaml")
    given = parser.parse_args()
    print(f"{COLUMNS}\n|{'---|' * (COLUMNS.count('|') - 1)}", flush=True)
    failed = []
    for path in sorted(RECIPES.glob("*_smollm2.yaml")):
        if given.only and path.stem not in given.only:
            continue
        for engine in engines(path.stem):
            row = run(path, engine, data_of(path.stem, given), given.model)
            print(row or f"| {path.stem} | {engine} | FAILED |", flush=True)
            failed += [] if row else [path.stem]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def engines(name: str) -> list[str]:
    """Of the rollouts: both for the recipes that are shown at length, else the one that starts sooner; none offline."""
    if name in ("grpo_gsm8k_smollm2", "grpo_arithmetic_smollm2"):
        return ["torch", "vllm"]
    if name == "ppo_reward_model_hh_smollm2":
        return ["vllm"]
    return ["torch"] if stages(name)[0].needs_rollouts else [""]


def stages(name: str) -> list[Recipe]:
    return load_recipe(RECIPES / f"{name}.yaml")


def data_of(name: str, given: argparse.Namespace) -> list[str]:
    """Overrides that put the files in the place of the hub's."""
    if "_hh_" in name:
        return [f"data.train.path={given.pairs.resolve()}", "data.train.max_bad_rows=400", *LOCAL]
    if "alpaca" in name:
        return [f"data.train.path={given.instructions.resolve()}", *LOCAL]
    train = stages(name)[0].data.train
    if "gsm8k" in name and not isinstance(train, list) and train.generator is not None:
        return [f"data.train.args.path={(given.gsm8k / 'example_model_solutions.jsonl').resolve()}"]
    if "gsm8k" in name:
        rewards = [f"rewards={json.dumps(REWARDS)}"] if stages(name)[0].needs_rollouts else []
        return [f"data.train.path={(given.gsm8k / 'train.jsonl').resolve()}", *LOCAL, *rewards]
    return []


def run(path: Path, engine: str, data: list[str], model: Path) -> str | None:
    """A line of the table; None when the run failed, which says why on standard error."""
    with tempfile.TemporaryDirectory(prefix="recipes_") as directory:
        overrides = [f"model.path={model.resolve()}", "tracking=[jsonl]", *SMALL, *data]
        overrides += [f"rollout.engine={engine}"] if engine else []
        if path.stem == "ppo_reward_model_hh_smollm2":
            # Whoever sets run.output_dir sets the reward model's path too.
            overrides += [f"stages.{stage}.run.steps={STEPS}" for stage in ("reward_model", "ppo")]
            overrides += ["stages.ppo.evaluation=null", "stages.ppo.algorithm.critic.warmup_steps=0"]
            overrides += [f"stages.ppo.rewards.0.args.path={directory}/run/reward_model/final"]
        else:
            overrides += [f"run.steps={STEPS}", "run.epochs=null"]
            overrides += ["algorithm.critic.warmup_steps=0"] if path.stem.startswith("ppo") else []
        command = [sys.executable, "-m", "rlflow", "run", str(path), f"run.output_dir={directory}/run", *overrides]
        started = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{path.stem}: not done within {TIMEOUT_S:.0f} s", file=sys.stderr, flush=True)
            return None
        if done.returncode != 0:
            print(f"{path.stem}:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
            return None
        seconds = time.perf_counter() - started
        written = sorted(Path(directory).rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime)[-1]
        steps = [json.loads(line) for line in written.read_text().splitlines()][1:]
    loss = next(name for name in SHOWN if name in steps[0])
    cells = [path.stem, engine or "-", f"{steps[0][loss]:.4f}, {steps[-1][loss]:.4f}"]
    for name, form in (("reward/mean", ".3f"), ("trainer/grad_norm", ".2f"), ("mismatch/logprob_abs_diff", ".1e")):
        cells.append(format(steps[-1][name], form) if name in steps[-1] else "-")
    return f"| {' | '.join(cells)} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
