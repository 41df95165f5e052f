"""What is suggested on a command line, and that bash takes it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlflow.cli.main import COMMANDS, main
from rlflow.cli.suggestions import suggest
from rlflow.recipe import ALGORITHMS
from rlflow.recipe.packaged import packaged_recipes

RECIPE = """\
algorithm: {name: sft}
stages:
  - {name: warm-up, run: {steps: 1}}
  - {name: rl, algorithm: {name: grpo}}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", [*COMMANDS, "--help", "--version"]),
        ("pl", ["plan"]),
        ("--v", ["--version"]),
        ("plan --", ["--help", "--gpu-memory", "--tokenize", "--no-data"]),
        ("plan --gpu-memory ", []),
        ("nothing ", []),
        ("run qui", ["quickstart", "quickstart_images"]),
        ("run mi", ["mine.yaml"]),
        ("algorithms gsp", ["gspo", "gspo_token"]),
        ("recipes quick", ["quickstart", "quickstart_images"]),
        ("completion ", ["bash", "zsh", "fish", "suggest"]),
        ("run mine.yaml trai", ["trainer."]),
        ("run mine.yaml --resume trainer.le", ["trainer.learning_rate="]),
        ("run mine.yaml trainer.schedule=", [f"trainer.schedule={v}" for v in ("constant", "linear", "cosine")]),
        ("run mine.yaml run.steps=1 rollout.recovery.hedge=t", ["rollout.recovery.hedge=true"]),
        ("run mine.yaml algorithm.loss.tau_p", ["algorithm.loss.tau_positive="]),
        ("run mine.yaml run.steps=", []),
        ("run mine.yaml st", ["stages."]),
        ("run mine.yaml stages.", ["stages.warm-up.", "stages.rl."]),
        ("plan mine.yaml stages.rl.run.see", ["stages.rl.run.seed="]),
        ("run quickstart stages.g", ["stages.grpo."]),
        ("run nowhere.yaml stages.", []),
    ],
)
def test_what_may_follow_is_suggested(line: str, expected: list[str]):
    assert suggest(line.split(" ")) == expected


def test_every_row_of_the_table_and_every_recipe_is_suggested():
    assert suggest(["algorithms", ""]) == list(ALGORITHMS)
    assert suggest(["recipes", ""]) == list(packaged_recipes())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlflow com", ["completion"]),
        ("rlflow run mine.yaml trainer.sch", ["trainer.schedule="]),
        ("rlflow run mine.yaml trainer.schedule=li", ["linear"]),
        ("rlflow run ", [*packaged_recipes(), "mine.yaml"]),
        (r"rlflow run my\ ", [r"my\ \*.yaml"]),
        (r"rlflow run my\ \*.yaml trainer.sch", ["trainer.schedule="]),
        ("rlflow report ", []),
    ],
)
def test_bash_completes_with_it(tmp_path: Path, line: str, expected: list[str]):
    if "my" in line:
        (tmp_path / "my *.yaml").write_text(RECIPE)
    command = tmp_path / "rlflow"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlflow "$@"\n')
    command.chmod(0o755)
    script = f"""
        eval "$(rlflow completion bash)"
        compopt() {{ :; }}
        COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}
        _rlflow
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    finished = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH\n{script}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert list(filter(None, finished.stdout.splitlines())) == expected, finished.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_own_parser_takes_the_script_where_it_is_installed(shell: str, capsys: pytest.CaptureFixture):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "completion suggest" in script
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)
