"""Do preference losses raise the margin on held-out pairs? From one SFT checkpoint of the quickstart's policy.

    python benchmarks/preference_rows.py runs/preference_rows           # all rows, some ten minutes on 2 cores
    python benchmarks/preference_rows.py runs/preference_rows dpo kto   # some

A pair is a sum and a number near it. The table goes to standard output and to DIRECTORY/table.md;
benchmarks/preference_rows.md is a copy of one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from online_rows import run, starting_point

from rlflow.recipe.presets import ALGORITHMS

HERE = Path(__file__).resolve().parent
STEPS, RATE = 60, 3.0e-5
STEPS_AND_RATES = {"reward_model": (300, 1.0e-4), "kto": (60, 1.0e-4)}
"""Of rows that need others: a reward model's head starts at 0."""
LOSSES = (
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
)


def main(directory: Path, rows: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    start = directory / "sft" / "final"
    if not start.exists():
        run(directory / "sft.yaml", starting_point(directory / "sft"))
    lines = ["| row | margin before | after | accuracy before | after |", "|---|---|---|---|---|"]
    for name in rows:
        run(directory / f"{name}.yaml", recipe_of(name, start, directory / name))
        steps = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        group = "eval/heldout/kto" if name == "kto" else "eval/heldout/preference"
        margins = [steps[i][f"{group}/margin"] for i in (0, -1)]
        shares = [100 * steps[i][f"{group}/accuracy"] for i in (0, -1)]
        shown = [f"{margins[0]:.3f}", f"{margins[1]:.3f}", f"{shares[0]:.1f}%", f"{shares[1]:.1f}%"]
        lines.append(f"| {name} | {' | '.join(shown)} |")
        (directory / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def recipe_of(name: str, start: Path, output: Path) -> dict[str, Any]:
    """``name``: a row, or a loss of the row dpo."""
    kind = "judged" if name == "kto" else "pairs"
    algorithm: dict[str, Any] = {"name": name} if name in ALGORITHMS else {"name": "dpo", "preference": {"loss": name}}
    if name in ("exo_pair", "robust"):
        algorithm["preference"]["label_smoothing"] = 1.0e-3
    steps, rate = STEPS_AND_RATES.get(name, (STEPS, RATE))
    source = {"generator": f"{HERE / 'arithmetic_pairs.py'}:{kind}"}
    return {
        "run": {"output_dir": str(output), "seed": 0, "steps": steps},
        "model": {"path": str(start)},
        "algorithm": algorithm,
        "data": {"train": source, "prompts_per_step": 64, "max_tokens": 32},
        "trainer": {"learning_rate": rate, "cpus_per_worker": 1},
        "evaluation": {"data": {**source, "args": {"split": "heldout"}}},
    }


if __name__ == "__main__":
    everything = [name for name, row in ALGORITHMS.items() if row.family == "preference"]
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or [*everything, *LOSSES])
