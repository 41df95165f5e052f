"""Secrets on the way from a recipe to a run: masked ones are asked for, and none travels on a job's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.cli.preflight import load_checked
from rlflow.driver.resuming import Inputs, write_recipe
from rlflow.recipe import RecipeError

RECIPE = """\
algorithm: {name: grpo}
model: {architecture: {model_type: qwen3}, characters: ab}
data: {train: {path: data.jsonl}}
rewards:
  - plugin: judge.py:score
    args: {credentials: {key: hunter2-a}, headers: {Authorization: Bearer hunter2-b}, url: "https://ann:hunter2-c@host"}
run: {steps: 1, output_dir: out}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "judge.py").write_text("def score(): ...\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems_of(path: Path, *overrides: str, alone: bool = False) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_checked(path, overrides, alone=alone)
    return [str(problem) for problem in raised.value.problems]


def test_the_recipe_that_a_run_leaves_has_no_secrets_and_asks_for_them(recipe_file: Path):
    out = recipe_file.parent / "out"
    out.mkdir()
    (recipe,) = load_checked(recipe_file)
    write_recipe(recipe, Inputs({}, {}, {}), out)
    written = out / "recipe.yaml"
    assert "hunter2" not in written.read_text()
    keys = [f"rewards.0.args.{key}" for key in ("credentials.key", "headers.Authorization", "url")]
    problems = problems_of(written)
    assert [problem.split(": ")[1] for problem in problems] == keys
    lines = written.read_text().splitlines()
    for problem, key in zip(problems, keys, strict=True):
        name = key.rpartition(".")[2]
        assert lines[int(problem.split(":")[1]) - 1].strip().startswith(f"{name}:")
        assert f"is a secret that was left out of this file: give it, on the command line {key}=..." in problem
    values = ("hunter2-a", "Bearer hunter2-b", "https://ann:hunter2-c@host")
    given = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    assert load_checked(written, given) == [recipe]


def test_a_variable_that_rewards_need_is_missed_before_a_run_on_this_machine(recipe_file: Path, monkeypatch):
    override = "reward_server.environment=[MY_KEY]"
    monkeypatch.delenv("MY_KEY", raising=False)
    (problem,) = problems_of(recipe_file, override, alone=True)
    assert "reward_server.environment.0: MY_KEY is not set: export it" in problem
    assert load_checked(recipe_file, [override])
    monkeypatch.setenv("MY_KEY", "x")
    assert load_checked(recipe_file, [override], alone=True)


def test_a_secret_is_no_part_of_a_jobs_command(recipe_file: Path, capsys: pytest.CaptureFixture):
    assert main(["submit", str(recipe_file), "rewards.0.args.credentials.key=hunter2"]) == 2
    said = capsys.readouterr().err
    assert "rewards.0.args.credentials.key: is a secret, and everybody who sees the dashboard" in said
    assert "hunter2" not in said


def test_a_plugin_that_fails_on_its_secrets_does_not_have_them_told(recipe_file: Path, monkeypatch, capsys):
    (recipe_file.parent / "data.jsonl").write_text('{"prompt": "a"}\n')
    plugin = "import os\nraise RuntimeError('hunter2-a and ' + os.environ['MY_SETTING'])\ndef score(): ...\n"
    (recipe_file.parent / "judge.py").write_text(plugin)
    monkeypatch.setenv("MY_SETTING", "hunter2-d")
    assert main(["plan", str(recipe_file), "reward_server.environment=[MY_SETTING]"]) == 2
    said = capsys.readouterr()
    assert "RuntimeError: *** and ***" in said.err
    assert "hunter2" not in said.out + said.err
