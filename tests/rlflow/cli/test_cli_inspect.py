from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlflow.cli.main import main
from rlflow.data.errors import DataError
from rlflow.driver.past_runs import read_run
from rlflow.inspection.show import show_rollout, visible
from rlflow.recipe import dump_recipe, load_recipe
from rlflow.tracking.rollouts import read_rollouts, write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat


def make_run(directory: Path, *steps: int, text: str = "4") -> Path:
    """Two rollouts of one prompt a step: one right, one that failed."""
    (directory / "rollouts").mkdir(parents=True)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
    prompt = Prompt("set:0", np.arange(2), messages, {"solution": "4"}, "<think>")
    for step in steps:
        right = flat([0, 1], [2, 3], 1.0, text=text, rewards={"exact": 1.0}, version=step - 1)
        failed = flat([0, 1], [2], math.nan, text="5", rewards={"exact": math.nan}, error="exact: it raised X")
        path = directory / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(path, [Group(prompt, 0, (right, failed))], [np.array([0.7, math.nan])], ["trained", "masked"])
    return directory


def test_the_newest_steps_rollouts_are_shown_with_what_rewards_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(make_run(tmp_path / "run", 3, 12))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/run, step 12: 2 of 2 rollouts",
        "== step 12, set:0 #0, reward 1, advantage 0.700, 2 tokens, stop",
        "system  Add.",
        "user  2+2=",
        "completion  <think>4",
        "solution  4",
        "== step 12, set:0 #1, reward -, advantage -, 1 tokens, stop, masked",
        "system  Add.",
        "user  2+2=",
        "completion  <think>5",
        "solution  4",
        "error  exact: it raised X",
    ]


def test_steps_conditions_order_and_limits_choose_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run", 1, 3, 12)
    arguments = ["--steps", "2:", "--where", "reward == 1", "--sort", "step", "--descending", "--limit", "1"]
    assert main(["inspect", str(run), *arguments]) == 0
    first, shown, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("steps 3 to 12: 2 of 4 rollouts") and shown.startswith("== step 12, set:0 #0")


def test_tokens_have_a_line_each_with_logprob_and_version(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(make_run(tmp_path / "run", 12)), "--tokens", "--limit", "1"]) == 0
    said = capsys.readouterr()
    assert '    -1.0000  version 11  "[2]"\n    -2.0000  version 11  "[3]"\n' in said.out
    assert "tokens are shown as ids" in said.err


def test_of_a_run_with_stages_the_one_that_wrote_rollouts_last_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run" / "sft" / "rollouts").mkdir(parents=True)
    make_run(tmp_path / "run" / "grpo", 3)
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/run/grpo, step 3: 2 of 2 rollouts")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no such directory"),
        (["empty"], "has no rollouts, here or one directory below. Stages that generate nothing"),
        (["run", "--step", "4"], "no rollouts of step 4; 2 steps from 3 to 12 have some, the nearest 3, 12"),
        (["run", "--steps", "4:11"], "no rollouts of any step of 4:11"),
        (["run", "--steps", "four"], "write it as 100:200"),
        (["run", "--step", "3", "--steps", "3:"], "not both"),
        (["run", "--where", "rewrd > 0"], "did you mean 'reward'?"),
        (["run", "--export", "no/such/best.jsonl"], "cannot be written (No such file or directory)"),
        (["run", "--rewards", "none_of_these"], "write file.py:function, or one of math_accuracy"),
        (["run", "--replay"], "there is no such file"),
        (["damaged"], "step_000003.parquet cannot be read, it is damaged or cut short"),
    ],
)
def test_what_cannot_be_shown_is_one_line_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), 3, 12)
    Path("empty").mkdir()
    (make_run(Path("damaged"), 3) / "rollouts" / "step_000003.parquet").write_bytes(b"PAR1 and so on")
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_terminal_is_told_nothing_by_what_the_policy_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run", 3, text="\x1b[2J\x1b]0;taken\x07 \u202egnp.\r\x9b31m ½ 👩\u200d🔬")
    assert main(["inspect", str(run), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert r"<think>\x1b[2J\x1b]0;taken\x07 \u202egnp.\r\x9b31m ½ 👩" in out
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(out)
    assert visible("a\tb\nc") == "a\tb\nc"


def test_a_call_of_a_tool_is_shown_with_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    prompt = Prompt("set:0", np.arange(2), [{"role": "user", "content": "2+2="}, call], {})
    (tmp_path / "rollouts").mkdir()
    path = tmp_path / "rollouts" / "step_000001.parquet"
    write_rollouts(path, [Group(prompt, 0, (flat([0, 1], [2], 1.0, text="4"),))], [np.zeros(1)], ["trained"])
    assert main(["inspect", str(tmp_path)]) == 0
    assert '"name": "add", "arguments": {"a": 2}' in capsys.readouterr().out


def test_on_a_terminal_unlikely_tokens_are_coloured(tmp_path: Path) -> None:
    (record, _) = read_rollouts(make_run(tmp_path / "run", 3) / "rollouts" / "step_000003.parquet")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", width=80)
    show_rollout(console, record, is_whole=True, tokens=["un", "likely"])
    # Logprobs -1 and -2 of a scale that ends at -5.
    assert "48;2;255;205;166m" in screen.getvalue() and "48;2;255;175;132m" in screen.getvalue()


def test_report_and_inspect_say_in_one_line_that_a_recipe_is_of_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / "inputs.json").write_text("{}")
    (run / "recipe.yaml").write_text("run: {name: old}\nmodel: {path: m}\n")
    (run / "metrics.jsonl").write_text('null\n{"step": 1, "time": 1.0, "reward/mean": 0.5}\n')
    for command in ("inspect", "report"):
        assert main([command, str(run)]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run}/recipe.yaml is of another version of rlflow" in line


def test_a_key_that_this_version_does_not_read_is_named(tmp_path: Path) -> None:
    (recipe,) = load_recipe(
        {
            "algorithm": {"name": "sft"},
            "model": {"architecture": {"model_type": "llama"}, "characters": "0123456789+="},
            "data": {"train": {"generator": "arithmetic"}},
            "run": {"steps": 1},
        }
    )
    (tmp_path / "recipe.yaml").write_text(f"{dump_recipe(recipe)}later: 3\n")
    with pytest.raises(DataError, match=r"another version of rlflow \(later: a key that this version does not read\)"):
        read_run(tmp_path)
