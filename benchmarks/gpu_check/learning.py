"""Whole runs, by the command that a user gives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measurements import Record, Skip

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
PASSED = "eval/heldout/pass@1"
LEAST_GAIN = 0.05


def quickstart(record: Record) -> None:
    """The recipe with its examples as it is and 60 steps of GRPO, trainer and engine on one GPU."""
    out = record.directory / "run"
    _run(QUICKSTART, f"run.output_dir={out}", *_shares(), "stages.grpo.run.steps=60", "stages.grpo.evaluation.every=60")
    _report(record, out / "grpo")


def grpo(record: Record, max_staleness: int) -> None:
    """GRPO in bfloat16, with vLLM where it is, from what the quickstart learned by examples."""
    start = record.directory.parent / "quickstart" / "run" / "sft" / "final"
    if not start.exists():
        raise Skip("starts from the quickstart's examples, and that part did not get so far")
    engine = "vllm" if importlib.util.find_spec("vllm") else "torch"
    recipe = {
        "algorithm": {"name": "grpo", "group_size": 8, "kl": {"coef": 0.0}},
        "model": {"path": str(start), "dtype": "bfloat16"},
        "data": {
            "train": {"generator": "arithmetic", "args": {"split": "train"}},
            "prompts_per_step": 64,
            "max_prompt_tokens": 16,
        },
        "rewards": [{"name": "exact_match"}],
        "rollout": {"engine": engine, "max_new_tokens": 6, "max_num_seqs": 512, "gpu_memory_fraction": 0.3},
        "trainer": {"learning_rate": 1e-4},
        "evaluation": {"data": {"generator": "arithmetic", "args": {"split": "heldout", "rows": 500}}},
        "run": {"steps": 60, "max_staleness": max_staleness, "output_dir": str(record.directory / "run")},
    }
    path = record.directory / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    record.add("engine", engine)
    _run(path, *_shares())
    _report(record, record.directory / "run")


def _shares() -> tuple[str, ...]:
    share = 0.5 if torch.cuda.is_available() else 0.0
    return f"trainer.gpus_per_worker={share}", f"rollout.gpus_per_worker={share}"


def _run(recipe: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "rlflow", "run", str(recipe), *overrides]
    subprocess.run(command, cwd=ROOT, check=True)


def _report(record: Record, directory: Path) -> None:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps: list[dict[str, Any]] = [line for line in lines if "time/train_s" in line]
    passed = [line[PASSED] for line in lines if PASSED in line]
    record.add("pass@1 before", passed[0])
    record.add("pass@1 after", passed[-1], least=passed[0] + LEAST_GAIN)
    mismatch = sum(step["mismatch/logprob_abs_diff"] for step in steps) / len(steps)
    record.add("mean difference of engine's and trainer's logprobs", mismatch, most=0.05)
    whole = sorted(step["time/step_s"] for step in steps)
    record.add("median step", whole[len(whole) // 2], "s")
