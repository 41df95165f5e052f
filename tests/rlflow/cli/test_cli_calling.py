"""What is said of options that are none, and of what no program can help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlflow.cli.main import load_command, main


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["infer", "runs/x", "temperature=0.5"], "--temperature=0.5"),
        (["eval", "runs/x", "--sampels", "4"], "--samples"),
        (["ui", "runs", "port=80"], "--port=80"),
    ],
)
def test_an_option_that_is_none_is_refused_in_one_line_with_the_one_it_resembles(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"(did you mean {meant}?)" in line
    assert line.endswith(f"`rlflow {arguments[0]} --help` lists what it takes")


def test_what_no_program_can_help_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(_arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "/data/model.safetensors")

    monkeypatch.setattr(load_command("logs"), "execute", fail)
    assert main(["logs", "runs/x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("/data/model.safetensors: Permission denied; another user's: have them allow it")


def test_a_command_whose_output_is_closed_does_its_work(tmp_path: Path):
    code = "import sys; sys.stdout = None; from rlflow.cli.main import main; sys.exit(main(['logs', sys.argv[1]]))"
    (tmp_path / "logs").mkdir()
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "logs" / "run.log").write_text("started\n")
    command = [sys.executable, "-c", code.replace("sys.argv[1]]", "sys.argv[1], 'run']"), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["serve", "ui"])
def test_a_port_that_is_none_is_not_taken_for_another(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exited:
        main([command, "runs", "--port", "99999"])
    assert exited.value.code == 2
    assert "99999 is no port: a number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["nan", "inf", "-1"])
def test_a_temperature_is_a_finite_number(given: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    batch = ["--data", "data.jsonl", "--output", str(tmp_path / "answers.jsonl")]
    for arguments in (["infer", "runs/x", *batch], ["eval", "runs/x"]):
        assert main([*arguments, "--temperature", given]) == 2
        assert "0 is greedy, and a finite number above it draws" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
