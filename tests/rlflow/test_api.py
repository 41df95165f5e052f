"""The verbs from Python: what they take, what they return, and how little importing them loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlflow
from tests.local_actors import use_local_actors

ROOT = Path(__file__).resolve().parents[2]
STAGES: dict[str, Any] = {
    "model": {
        "characters": "0123456789+=",
        "architecture": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        },
    },
    "data": {
        "train": {"generator": "arithmetic", "args": {"digits": 1}},
        "prompts_per_step": 4,
        "max_tokens": 32,
        "max_prompt_tokens": 16,
    },
    "evaluation": {
        "data": {"generator": "arithmetic", "args": {"digits": 1, "split": "heldout"}, "rows": 2},
        "reward": {"name": "exact_match"},
    },
    "rollout": {"engine": "torch", "max_new_tokens": 4},
    "tracking": ["jsonl"],
    "stages": [
        {"name": "sft", "algorithm": {"name": "sft"}, "run": {"steps": 2}},
        {
            "name": "grpo",
            "algorithm": {"name": "grpo", "group_size": 2},
            "rewards": [{"name": "exact_match"}],
            "run": {"steps": 1},
        },
    ],
}


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> rlflow.Result:
    use_local_actors(monkeypatch)
    (tmp_path / "mine.py").write_text("def sums(completion_ids):\n    return [sum(ids) for ids in completion_ids]\n")
    sft, grpo = STAGES["stages"]
    grpo = {**grpo, "rewards": [{"plugin": tmp_path / "mine.py:sums"}]}
    recipe = {**STAGES, "stages": [sft, grpo], "run": {"output_dir": tmp_path / "run"}}
    return rlflow.run(recipe, {"stages.sft.run.steps": 3})


def test_a_run_of_two_stages_returns_what_each_of_them_left(finished: rlflow.Result, tmp_path: Path):
    directory = tmp_path / "run"
    assert finished.directory == directory and list(finished.stages) == ["sft", "grpo"]
    sft, grpo = finished.stages.values()
    assert sft.directory == directory / "sft" and len(sft.steps) == 1 + 3
    rows = [json.loads(line) for line in (directory / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert sft.series("loss/sft") == [(row["step"], row["loss/sft"]) for row in rows[1:]]
    assert sft.metrics["eval/heldout/pass@1"] == rows[-1]["eval/heldout/pass@1"]
    assert finished.metrics == grpo.metrics and finished.final == grpo.final == directory / "grpo" / "final"
    assert grpo.best == directory / "grpo" / "checkpoints" / "step_000001"
    assert {record.sample_index for record in finished.rollouts(1)} == {0, 1} and len(finished.rollouts(1)) == 8
    assert grpo.recipe["algorithm"]["name"] == "grpo"
    with pytest.raises(KeyError, match="no step has loss/policy; there are step, time, "):
        sft.series("loss/policy")
    with pytest.raises(rlflow.DataError, match="the stage does not generate"):
        sft.rollouts(1)
    assert rlflow.read_result(directory) == finished


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(rlflow.DataError, match=r"no metrics\.jsonl"):
        rlflow.read_result(tmp_path)


def test_a_recipe_from_a_program_is_that_of_the_file_that_says_the_same(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**STAGES, "run": {"output_dir": str(tmp_path)}}))
    given = {**STAGES, "run": {"output_dir": tmp_path, "seed": np.int64(0)}}
    of_file = rlflow.load_recipe(path)
    assert rlflow.load_recipe(given) == of_file
    assert rlflow.load_recipe(of_file) == of_file
    assert rlflow.load_recipe(of_file[1], {"run.steps": 7})[0].run.steps == 7
    assert given["run"]["output_dir"] == tmp_path, "what was given is not changed"


def test_what_is_wrong_with_a_recipe_from_a_program_is_said_by_key(tmp_path: Path):
    wrong = {**STAGES, "trainer": {"learning_rat": 1e-3}, "tracking": [len]}
    with pytest.raises(rlflow.RecipeError) as refused:
        rlflow.load_recipe(wrong)
    assert str(refused.value).startswith("recipe: tracking.0: is a builtin_function_or_method: give text, ")
    with pytest.raises(rlflow.RecipeError) as refused:
        rlflow.load_recipe({**wrong, "tracking": []})
    assert str(refused.value) == "recipe: trainer.learning_rat: unknown key here (did you mean learning_rate?)"
    with pytest.raises(rlflow.RecipeError, match=r"^overrides: run\.step: unknown key here \(did you mean steps\?"):
        rlflow.load_recipe(STAGES, {"run.step": 3})


def test_a_recipe_from_a_program_may_extend_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "base.yaml").write_text(json.dumps(STAGES))
    monkeypatch.chdir(tmp_path)
    sft, _ = rlflow.load_recipe({"extends": "base.yaml", "trainer": {"learning_rate": 3e-4}})
    assert sft.trainer.learning_rate == 3e-4 and sft.run.output_dir == str(tmp_path / "runs" / "run" / "sft")


def test_a_plan_is_printed_as_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    from rlflow.cli.main import main

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(STAGES))
    assert main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    print(*rlflow.plan(path), sep="\n\n")
    assert capsys.readouterr().out == printed
    assert "sft: cross-entropy" in printed


def test_importing_the_package_loads_nothing_and_every_name_of_it_is_there():
    code = (
        "import sys, rlflow\n"
        # The environment's own hook is in every process.
        "own = {n for n in sys.modules if n.startswith('rlflow')} - {'rlflow.torchvision_operators'}\n"
        "assert own == {'rlflow', 'rlflow.callbacks'}, own\n"
        "assert not {'pydantic', 'numpy', 'yaml', 'torch', 'ray'} & sys.modules.keys()\n"
        "from rlflow import *\n"
        "assert {name for name in rlflow.__all__} <= globals().keys() and set(rlflow.__all__) <= set(dir(rlflow))\n"
        "assert not {'torch', 'ray', 'transformers', 'vllm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


USER_SCRIPT = """\
from collections.abc import Mapping
from pathlib import Path

import rlflow


class Patience(rlflow.Callback):
    def __init__(self, patience: int) -> None:
        self.left, self.best = patience, 0.0

    def on_evaluation(self, step: int, name: str, metrics: Mapping[str, float]) -> rlflow.Answer:
        self.left -= metrics["pass@1"] <= self.best
        self.best = max(self.best, metrics["pass@1"])
        return "stop" if self.left < 0 else None


def tokens(groups: list[rlflow.Group]) -> float:
    return sum(len(rollout.completion_ids) for group in groups for rollout in group.rollouts)


try:
    result = rlflow.run("recipe.yaml", {"run.steps": 3}, callbacks=[Patience(2), lambda step, metrics: None])
except rlflow.RecipeError as error:
    print(error.problems[0].key)
else:
    final: Path | None = result.final
    reveal_type(result.series("reward/mean"))
    reveal_type(rlflow.plan({"algorithm": {"name": "sft"}})[0].recipe.trainer.learning_rate)
    reveal_type(rlflow.load_recipe("recipe.yaml"))
    result.directory = Path("elsewhere")
    rlflow.run("recipe.yaml", resume="yes")
"""


@pytest.mark.slow
def test_a_users_script_is_typed(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path).stdout)
    lines = USER_SCRIPT.splitlines()
    found = {
        (d["severity"], lines[d["range"]["start"]["line"]].strip()): d["message"] for d in said["generalDiagnostics"]
    }
    types = [message.partition(" is ")[2] for (severity, _), message in found.items() if severity == "information"]
    assert types == ['"list[tuple[int, float]]"', '"float"', '"list[Recipe]"']
    errors = {line for severity, line in found if severity == "error"}
    assert errors == {'result.directory = Path("elsewhere")', 'rlflow.run("recipe.yaml", resume="yes")'}, found
