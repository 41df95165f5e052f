"""The commands: messages, exit codes, help, and how little they load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlflow
from rlflow import cli
from rlflow.cli.main import CALLED_ELSEWHERE, COMMANDS, load_command, main, summary_of
from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError, StopRequested
from rlflow.recipe import ALGORITHMS, TASKS, RecipeError

RECIPE = """\
algorithm: {name: sft}
model: {architecture: {model_type: llama}, characters: "0123456789+="}
data: {train: {generator: arithmetic, args: {digits: 1}}, max_tokens: 32}
run: {steps: 1}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


class FakeDriver:
    """Stands for rlflow.driver.run: remembers what it was asked for, fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failure: BaseException | None = None
        self.calls: list[tuple[list, bool]] = []
        self.logs: Path | None = None
        """Made by the run, where it is given."""
        module = SimpleNamespace(run_recipes=self.run_recipes)
        monkeypatch.setitem(sys.modules, "rlflow.driver.run", module)  # type: ignore[arg-type]
        actors = SimpleNamespace(ActorFailure=FakeActorFailure)
        monkeypatch.setitem(sys.modules, "rlflow.actors.actor_group", actors)  # type: ignore[arg-type]

    def run_recipes(
        self, recipes: list, *, resume: bool, seconds_before: float, process_ends: bool = False, callbacks: Any = ()
    ) -> None:
        assert seconds_before >= 0
        self.calls.append((recipes, resume))
        if self.logs is not None:
            self.logs.mkdir(parents=True)
        if self.failure is not None:
            raise self.failure


class FakeActorFailure(RuntimeError):
    def __init__(self, actor: str, call: str, reason: str, *, refused: bool = False) -> None:
        super().__init__(f"{actor}.{call}: {reason}")
        self.call, self.refused = call, refused


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(monkeypatch)


def test_run_hands_the_recipe_to_the_driver_wherever_its_options_stand(recipe_file: Path, driver: FakeDriver):
    assert main(["run", str(recipe_file), "--resume", "run.steps=3"]) == 0
    assert main(["run", str(recipe_file), "run.steps=3"]) == 0
    assert [(recipes[0].run.steps, resume) for recipes, resume in driver.calls] == [(3, True), (3, False)]


def test_run_from_python_does_the_same(recipe_file: Path, driver: FakeDriver):
    rlflow.run(recipe_file, overrides={"run.steps": 3}, resume=True)
    ((recipes, resume),) = driver.calls
    assert (recipes[0].run.steps, resume) == (3, True)
    with pytest.raises(RecipeError):
        rlflow.run(recipe_file, {"run.stesp": 3})


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DataError("data.jsonl, row 3: no prompt"), 2),
        (StopRequested("stopped after step 4; go on with --resume"), 3),
        (RunError("the reward server failed"), 1),
        (FakeActorFailure("trainer[1]", "optim_step", "the actor died"), 1),
        (FakeActorFailure("trainer[1]", "forward_backward", "ValueError: no", refused=True), 1),
    ],
)
def test_a_failure_that_is_understood_is_its_message_and_an_exit_code(
    failure: Exception, code: int, recipe_file: Path, driver: FakeDriver, capsys: pytest.CaptureFixture
):
    driver.failure = failure
    logs = recipe_file.parent / "runs" / "recipe" / "logs"
    driver.logs = logs
    assert main(["run", str(recipe_file)]) == code
    error = capsys.readouterr().err
    assert error.splitlines()[0] == str(failure)
    assert (f"logs: {logs}" in error) == (code == 1)


@pytest.mark.parametrize("call", ["setup", "load"])
def test_what_an_actor_cannot_load_is_wrong_input(
    call: str, recipe_file: Path, driver: FakeDriver, capsys: pytest.CaptureFixture
):
    driver.failure = FakeActorFailure("trainer[0]", call, "ValueError: an adapter of another model", refused=True)
    assert main(["run", str(recipe_file)]) == 2
    assert capsys.readouterr().err == f"trainer[0].{call}: ValueError: an adapter of another model\n"


def test_a_failure_that_nobody_foresaw_keeps_its_traceback(recipe_file: Path, driver: FakeDriver):
    driver.failure = KeyError("x")
    with pytest.raises(KeyError):
        main(["run", str(recipe_file)])


def test_an_interrupt_is_no_traceback(recipe_file: Path, driver: FakeDriver, capsys: pytest.CaptureFixture):
    driver.failure = KeyboardInterrupt()
    assert main(["run", str(recipe_file)]) == 1
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_recipe_is_exit_code_2_and_nothing_starts(
    command: str, recipe_file: Path, driver: FakeDriver, capsys: pytest.CaptureFixture
):
    assert main([command, str(recipe_file), "run.stesp=1"]) == 2
    assert "command line: run.stesp: unknown key here (did you mean steps?)" in capsys.readouterr().err
    assert driver.calls == []


def test_a_bad_recipe_ends_the_process_before_anything_heavy_is_imported(recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("steps", "stesp"))
    command = [sys.executable, "-X", "importtime", "-m", "rlflow", "run", str(recipe_file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2
    assert f"{recipe_file}:4: run.stesp: unknown key here (did you mean steps?)" in finished.stderr
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if "import time:" in line}
    assert "rlflow.recipe.schema" in imported
    assert not imported & {"ray", "torch", "transformers", "vllm", "datasets"}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "unused"), [("--no-data", {"transformers"}), ("run.steps=1", {"transformers"})])
def test_plan_answers_without_ray_or_torch(recipe_file: Path, option: str, unused: set[str]):
    code = (
        "import sys; from rlflow.cli.main import main; code = main(sys.argv[1:])\n"
        f"assert not {unused | {'ray', 'torch', 'vllm', 'datasets'}} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "plan", str(recipe_file), option]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert ("data       91 rows" in finished.stdout) == (option != "--no-data")
    assert "sft: cross-entropy" in finished.stdout
    assert "memory is not estimated: its config has no hidden_size" in finished.stdout


def test_every_module_of_a_command_is_in_the_list():
    modules = Path(cli.__file__).parent.glob("*.py")
    assert sorted(COMMANDS) == sorted(path.stem for path in modules if "\nSUMMARY = " in path.read_text())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_has_an_example_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exited:
        main([*command.split(), "--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  rlflow {command}" in text
    assert "2 the recipe or data is wrong" in text


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_list_of_commands_loads_none_of_them(option: str):
    code = (
        "import sys; from rlflow.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('pydantic', 'numpy', 'yaml', 'torch')])\n"
        # The environment's .pth has every process load this one, a module without imports of its own.
        "own = {name for name in sys.modules if name.startswith('rlflow')} - {'rlflow.torchvision_operators'}\n"
        "print(sorted(own))"
    )
    finished = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    *said, heavy, own = finished.stdout.splitlines()
    assert heavy == "[]"
    names = ["callbacks", "cli", "cli.common", "cli.main", "garbage"]
    assert own == str(["rlflow", *(f"rlflow.{name}" for name in names)])
    assert said == [f"rlflow {rlflow.__version__}"] if option == "--version" else "commands:" in said


def test_the_list_of_commands_says_of_each_what_its_module_says():
    assert {name: summary_of(name) for name in COMMANDS} == {name: load_command(name).SUMMARY for name in COMMANDS}


def test_a_key_of_the_recipe_with_dashes_is_refused_with_how_to_write_it(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exited:
        main(["run", "recipe.yaml", "--run.steps=3"])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--run.steps=3 (keys of the recipe are set without dashes: run.steps=3)" in line


@pytest.mark.parametrize(
    ("word", "meant"),
    [("rnu", " (did you mean rlflow run?)"), ("chat", " (did you mean rlflow infer?)"), ("zzz", "")],
)
def test_an_unknown_command_is_refused_with_the_one_that_is_meant(word: str, meant: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exited:
        main([word])
    assert exited.value.code == 2
    said = f"rlflow: error: there is no command {word}{meant}; `rlflow --help` lists them\n"
    assert capsys.readouterr().err == said


def test_every_word_of_another_framework_leads_to_a_command():
    assert set(CALLED_ELSEWHERE.values()) <= set(COMMANDS) and not set(CALLED_ELSEWHERE) & set(COMMANDS)


def test_a_command_without_its_recipe_is_told_what_it_needs_and_no_more(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["run"])
    assert "arguments are required: RECIPE; `rlflow run --help`" in capsys.readouterr().err


def test_the_name_of_a_packaged_recipe_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quikstart"]) == 2
    assert "did you mean quickstart? `rlflow recipes` lists" in capsys.readouterr().err
    (tmp_path / "quickstart1.yaml").touch()
    assert main(["plan", "quikstart1.yaml"]) == 2
    assert "did you mean quickstart1.yaml?" in capsys.readouterr().err
    assert main(["plan", "elsewhere/quikstart.yaml"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "wrong"), [("missing", "there is no such directory"), ("recipe.yaml", "is a file")])
def test_a_report_of_no_directory_says_so(name: str, wrong: str, recipe_file: Path, capsys: pytest.CaptureFixture):
    assert main(["report", name]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: {wrong}: give the directory")


def test_algorithms_lists_the_table_with_its_sources(capsys: pytest.CaptureFixture):
    assert main(["algorithms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = " ".join(" ".join(lines).split())
    for name, row in ALGORITHMS.items():
        assert f"{name} {row.summary} ({row.source})" in text


def test_algorithms_shows_the_columns_of_every_row(capsys: pytest.CaptureFixture):
    assert main(["algorithms"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "grpo group_mean/group_std token 0.2/0.2 clip, sequence k3 loss 0.04 ref" in lines
    assert "gspo_token group_mean/group_std sequence_token 3e-4/4e-4 clip, sequence" in lines
    assert "ppo gae, whitened token 0.2/0.2 clip, token k1 reward 0.02 ref, critic" in lines
    assert "sapo group_mean/group_std token tau 1/1.05 sapo, sequence" in lines
    assert "cpo sigmoid token beta 0.1, sft_coef 1" in lines
    assert "kto kto beta 0.1, desirable_weight 1, undesirable_weight 1 ref" in lines


def test_algorithms_lists_every_row_under_its_task(capsys: pytest.CaptureFixture):
    assert main(["algorithms"]) == 0
    sections = capsys.readouterr().out.split("\n\n")
    listed = {
        section.partition(":")[0]: [line.split()[0] for line in section.splitlines()[1:] if line[0] != " "]
        for section in sections[:-1]
    }
    assert listed == {
        task: names for task in TASKS if (names := [name for name, row in ALGORITHMS.items() if row.task == task])
    }
    assert listed["preferences"] == ["dpo", "cpo", "simpo", "orpo", "kto", "apo_zero_unpaired"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_of_the_table_can_be_shown(name: str, capsys: pytest.CaptureFixture):
    assert main(["algorithms", name]) == 0
    assert f"{name}: {ALGORITHMS[name].summary}" in capsys.readouterr().out


def test_a_row_marks_what_it_sets_and_says_what_each_option_means(capsys: pytest.CaptureFixture):
    assert main(["algorithms", "grpo"]) == 0
    text = capsys.readouterr().out
    assert "* kl.coef: 0.04\n      Weight of the KL to the reference; 0 needs no reference." in text
    assert "  loss.clip_low: 0.2\n" in text


def test_a_row_shows_the_options_that_it_uses_and_says_what_brings_in_others(capsys: pytest.CaptureFixture):
    assert main(["algorithms", "dpo"]) == 0
    text = capsys.readouterr().out
    assert "  preference.beta: 0.1\n" in text
    assert "  preference.loss exo_pair: preference.divergence, preference.label_smoothing\n" in text
    for foreign in ("kl.coef", "group_size", "preference.center_coef", "critic"):
        assert foreign not in text
    assert main(["algorithms", "grpo"]) == 0
    text = capsys.readouterr().out
    assert "  loss.kind sapo: loss.tau_positive, loss.tau_negative\n" in text
    assert "  loss.tau_positive: " not in text


def test_an_unknown_algorithm_names_the_nearest(capsys: pytest.CaptureFixture):
    assert main(["algorithms", "gprpo"]) == 2
    assert "did you mean grpo?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_users_own_rewards_and_actors_are_not_taken_for_ours(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("raise ImportError\n")
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise ImportError\n")
    home = str(Path(rlflow.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), home])}
    imports = (
        "import rlflow.cli.run, rlflow.driver.run, rlflow.placement, rlflow.actors.trainer, rlflow.rewards\n"
        "from rlflow.actors.reward_server import RewardServer\n"
        "from rlflow.recipe import RewardBlock\n"
        "server = RewardServer([RewardBlock(name='exact_match')], 1)\n"
        "server.ready()\n"
        "server.close()\n"
    )
    for command in (["-m", "rlflow", "algorithms"], ["-c", imports]):
        finished = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert finished.returncode == 0, finished.stderr
