"""What a user names becomes a directory that transformers loads, or one line that says why not and what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import save_file

import rlflow
from rlflow import checkpoint
from rlflow.data.errors import DataError
from rlflow.model_source import ModelSource, find_model
from tests.local_actors import use_local_actors

ROWS = [
    {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": word}]}
    for word in ("one", "two")
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run of three steps that kept them all; its loss on held-out rows makes one of them the best."""
    directory = tmp_path_factory.mktemp("runs")
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "run": {"output_dir": str(directory / "words"), "steps": 3, "save_every": 1, "keep_checkpoints": 3},
        "model": {"path": str(tiny_model_dir)},
        "algorithm": {"name": "sft"},
        "data": {"train": {"path": str(rows)}, "prompts_per_step": 1, "max_tokens": 64},
        "evaluation": {"data": {"path": str(rows)}, "every": 1},
        "trainer": {"learning_rate": 1.0e-2},
        "tracking": ["jsonl"],
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_local_actors(monkeypatch)
        rlflow.run(directory / "recipe.yaml")
    return directory / "words"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "words", symlinks=True))


def contents_of(directory: Path | None) -> dict[str, bytes]:
    assert directory is not None
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != checkpoint.FINAL_MANIFEST}


def find(*names: Any, **options: Any) -> tuple[ModelSource, list[str]]:
    told: list[str] = []
    return find_model(str(Path(*names)), tell=told.append, **options), told


def refusal(*names: Any, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        find(*names, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_run_stands_for_its_final_and_knows_its_recipe(run: Path):
    source, told = find(run)
    assert (source.directory, source.run, source.name, source.base, source.step) == (
        run / "final",
        run,
        "words",
        None,
        None,
    )
    assert source.recipe is not None and source.recipe.run.save_every == 1
    assert find(run, "final")[0] == source
    assert told == []


def test_the_export_of_the_last_checkpoint_is_final_to_the_bit(run: Path):
    source, _ = find(run, checkpoint="latest")
    assert source.directory == run / "exports" / "step_000003"
    assert contents_of(source.directory) == contents_of(run / "final")
    assert source.step == 3
    assert checkpoint.read_manifest(run / "exports" / "step_000003", checkpoint.FINAL_MANIFEST)["step"] == 3


def test_an_earlier_checkpoint_has_its_own_weights_and_a_card_that_ends_with_it(run: Path):
    first, last = (contents_of(find(run, checkpoint=step)[0].directory) for step in ("1", "3"))
    assert first.keys() == last.keys()
    assert first["model.safetensors"] != last["model.safetensors"]
    assert "1 steps of" in first["README.md"].decode() and "3 steps of" in last["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "step_000002", "2"])
def test_a_checkpoint_is_named_by_its_link_its_directory_or_its_number(run: Path, name: str):
    step = int((run / "checkpoints" / "best").resolve().name[-1]) if name == "best" else 2
    by_option, _ = find(run, checkpoint=name)
    assert by_option.step == step
    if name != "2":
        assert find(run, "checkpoints", name)[0] == by_option


@pytest.mark.slow
def test_an_export_is_written_once_and_again_when_the_checkpoint_is_another(run: Path):
    source, told = find(run, checkpoint="2")
    assert len(told) == 1 and "step_000002" in told[0]
    assert source.directory is not None
    written = (source.directory / "model.safetensors").stat().st_mtime_ns
    again, told = find(run, checkpoint="2")
    assert (again, told) == (source, [])
    assert (source.directory / "model.safetensors").stat().st_mtime_ns == written
    # A run that goes on from step 1 trains another step 2.
    shutil.rmtree(run / "checkpoints" / "step_000002")
    checkpoint.publish(
        run / "checkpoints",
        2,
        {"step": 2},
        lambda directory: shutil.copytree(
            run / "checkpoints" / "step_000001",
            directory,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(checkpoint.MANIFEST),
        ),
    )
    _, told = find(run, checkpoint="2")
    assert len(told) == 1
    first, second = (contents_of(find(run, checkpoint=step)[0].directory) for step in ("1", "2"))
    assert first["model.safetensors"] == second["model.safetensors"]


def test_a_changed_export_is_written_again(run: Path):
    directory = find(run, checkpoint="2")[0].directory
    assert directory is not None
    before = contents_of(directory)
    save_file({}, directory / "model.safetensors")
    assert contents_of(find(run, checkpoint="2")[0].directory) == before


def test_an_export_goes_where_it_is_asked_for(run: Path, tmp_path: Path):
    source, _ = find(run, checkpoint="2", output=tmp_path / "here")
    assert source.directory == tmp_path / "here"
    assert source.recipe is not None and not (run / "exports").exists()


def test_where_nobody_may_write_the_export_lies_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch):
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if run in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    source, told = find(run, checkpoint="3")
    assert contents_of(source.directory) == contents_of(run / "final")
    assert source.directory is not None and run not in source.directory.parents
    assert any("is read-only" in line for line in told)


def test_of_several_stages_the_last_that_has_finished_is_taken_and_named(run: Path):
    parent = run.parent / "two"
    for began, stage in enumerate(("words", "after")):
        shutil.copytree(run, parent / stage, symlinks=True)
        (parent / stage / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": began}) + "\n")
    source, told = find(parent)
    assert source.directory == parent / "after" / "final"
    assert told == [f"{parent} has the stages words, after: takes after, the last finished"]
    shutil.rmtree(parent / "after" / "final")
    assert find(parent)[0].directory == parent / "words" / "final"
    assert find(parent, checkpoint="latest")[0].run == parent / "after"
    # Of a stage that ran twice the first one moved aside.
    shutil.copytree(run, parent / "words.1", symlinks=True)
    assert find(parent)[0].directory == parent / "words" / "final"


def test_a_model_that_moved_with_its_run_is_found(run: Path, tiny_model_dir: Path, tmp_path: Path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = "/gone/runs/sft/final"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "/gone/runs/sft/final, which is not there" in refusal(run, checkpoint="3")
    shutil.copytree(tiny_model_dir, run.parent / "sft" / "final")
    assert find(run, checkpoint="3")[0].step == 3


def test_an_adapter_names_its_base(tmp_path: Path, tiny_model_dir: Path):
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tiny_model_dir), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    source, _ = find(tmp_path, "adapter")
    assert (source.base, source.is_adapter, source.run) == (str(tiny_model_dir), True, None)


def test_a_model_without_a_run_stands_for_itself(tiny_model_dir: Path):
    source, _ = find(tiny_model_dir)
    assert (source.path, source.name, source.run, source.recipe) == (
        str(tiny_model_dir),
        tiny_model_dir.name,
        None,
        None,
    )


def test_a_hub_id_is_left_to_transformers():
    source, _ = find("some-organisation/some-model")
    assert (source.path, source.directory, source.name) == ("some-organisation/some-model", None, "some-model")


def remove_final(run: Path) -> Path:
    shutil.rmtree(run / "final")
    return run


def change_recipe(run: Path) -> Path:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["trainer"]["grad_accum"] = 3
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def truncate(run: Path) -> Path:
    (state,) = (run / "checkpoints" / "step_000002").glob("state-*")
    os.truncate(state, 1000)
    return run


def damage_final(run: Path) -> Path:
    (run / "final" / "config.json").write_text("{}")
    return run


def keep_the_recipe_alone(run: Path) -> Path:
    for name in ("checkpoints", "final", "inputs.json"):
        (run / name).rename(run.parent / name)
    return run


def forget_best(run: Path) -> Path:
    (run / "checkpoints" / "best").unlink()
    return run


@pytest.mark.parametrize(
    ("change", "checkpoint", "says"),
    [
        (remove_final, None, r"has not finished, there is no final/: --checkpoint 3 is its newest whole checkpoint"),
        (change_recipe, "2", r"another version of rlflow \(trainer.grad_accum: .*\): use that version; .*/final needs"),
        (truncate, "2", r"state-00000-of-00001.safetensors: differs .* name another checkpoint"),
        (damage_final, None, r"config.json: differs from the manifest.*--resume"),
        (forget_best, "best", r"has no best checkpoint .*--checkpoint latest, or a step; it keeps 1, 2, 3"),
        (lambda run: run, "7", r"has no checkpoint 7: it keeps 1, 2, 3; run.save_every"),
        (lambda run: run, "newest", r"--checkpoint newest: write best, latest or a step's number"),
        (lambda run: run / "final", "2", r"is a model's directory, and --checkpoint is of a run"),
        (lambda run: run / "checkpoints" / "best", "2", r"is a checkpoint itself"),
        (lambda run: run / "checkpoints", None, r"holds no run and no model: name its run, .*/words, and --checkpoint"),
        (keep_the_recipe_alone, None, r"a run that saved nothing has its recipe.yaml alone; rlflow run .*/recipe.yaml"),
        (lambda run: run / "rollouts", None, r"holds no run and no model: a run's directory has recipe.yaml"),
        (lambda run: run.parent, None, None),
        (lambda run: run / "recipe.yaml", None, r"is a file: name a run"),
        (lambda run: run.with_name("word"), None, r"there is no .*/word: .*Nearest: words"),
        (lambda run: run.with_name("swap"), None, r"there is no .*/swap: (?!.*Nearest)"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_a_remedy(
    run: Path, change: Callable[[Path], Path], checkpoint: str | None, says: str | None
):
    name = change(run)
    if says is None:
        assert find(name)[0].directory == run / "final"
    else:
        assert re.search(says, refusal(name, checkpoint=checkpoint))


def test_the_final_of_a_run_of_another_version_is_used_without_its_recipe(run: Path):
    change_recipe(run)
    source, told = find(run)
    assert (source.directory, source.recipe, source.run) == (run / "final", None, run)
    assert "is used without its run's settings" in told[0] and "trainer.grad_accum" in told[0]


def test_a_killed_run_offers_its_newest_whole_checkpoint_or_says_that_none_is(run: Path):
    shutil.rmtree(run / "final")
    (run / "checkpoints/step_000003/manifest.json").unlink()
    assert "--checkpoint 2 is its newest whole checkpoint" in refusal(run)
    assert refusal(run, checkpoint="3").startswith(f"{run}/checkpoints/step_000003/manifest.json: missing")
    for step in (1, 2):
        (run / f"checkpoints/step_{step:06d}/manifest.json").unlink()
    for checkpoint_asked in (None, "latest"):
        said = refusal(run, checkpoint=checkpoint_asked)
        assert "no checkpoint is whole" in said
        assert "--resume" in said
        assert "Errno" not in said


def test_latest_is_the_newest_checkpoint_that_is_whole(run: Path):
    (state,) = (run / "checkpoints" / "step_000003").glob("state-*")
    os.truncate(state, 1000)
    source, told = find(run, checkpoint="latest")
    assert source.step == 2
    assert "step_000003 is damaged" in told[0]
