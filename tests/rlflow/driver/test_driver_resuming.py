"""What a run that is resumed goes on from, and what it refuses: whole runs of a tiny model, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import NEW_MODEL, RunRecipe, as_if_killed_after, metrics_of, same_weights, steps_of

from rlflow.checkpoint import FINAL_MANIFEST, CheckpointError
from rlflow.data.errors import DataError
from rlflow.data.sources import read_table
from rlflow.driver.errors import RunError
from rlflow.driver.resuming import (
    Inputs,
    changes_since,
    is_finished,
    lasts_longer,
    length_of,
    sum_of_rows,
    write_recipe,
)
from rlflow.recipe import Recipe, RecipeError, SourceBlock

Run = Callable[..., Path]
OLDEST_BLOCKS = (
    "algorithm",
    "model",
    "data",
    "rewards",
    "reward_server",
    "rollout",
    "trainer",
    "reference",
    "run",
    "tracking",
)
"""Of the recipe that the first version with checkpoints wrote down."""


def write_rows(path: Path, answer: str = "{}") -> Path:
    rows = [{"prompt": f"{i}+1=", "response": answer.format(i + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path) -> Run:
    """Runs four steps of SFT into ``tmp_path / name``; keywords are ``--resume`` and keys of the recipe."""
    recipe = {
        "algorithm": {"name": "sft"},
        "model": NEW_MODEL,
        "data": {"train": {"path": str(write_rows(tmp_path / "rows.jsonl"))}, "prompts_per_step": 4, "max_tokens": 32},
        "trainer": {"learning_rate": 1e-2, "schedule": "cosine"},
        "run": {"steps": 4, "save_every": 2},
    }
    return partial(run_recipe, recipe)


def rates_of(directory: Path) -> list[float]:
    return [line["trainer/learning_rate"] for line in metrics_of(directory) if line["step"]]


def test_a_run_without_checkpoints_is_not_restarted_over_its_metrics(run: Run):
    directory = run()
    shutil.rmtree(directory / "final")
    shutil.rmtree(directory / "checkpoints")
    before = (directory / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"run: 4 steps were trained and no checkpoint is left .* Without --resume"):
        run(resume=True)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_a_run_that_keeps_no_metrics_is_known_by_its_rollouts(run: Run, tmp_path: Path):
    directory = run(tracking=["console"])
    shutil.rmtree(directory / "final")
    shutil.rmtree(directory / "checkpoints")
    (directory / "rollouts" / "step_000003.parquet").touch()
    with pytest.raises(DataError, match="3 steps were trained"):
        run(resume=True, tracking=["console"])


@pytest.mark.slow
def test_what_trained_nothing_starts_at_its_first_step(run: Run, tmp_path: Path):
    directory = run(resume=True)
    assert steps_of(directory) == [0, 1, 2, 3, 4]
    stopped_at_once = run("again")
    as_if_killed_after(stopped_at_once, 0)
    lines = (stopped_at_once / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped_at_once / "metrics.jsonl").write_text(lines[0])
    assert same_weights(run("again", resume=True), directory)


def test_all_checkpoints_damaged_is_an_error_of_one_sentence(run: Run):
    directory = run(run__keep_checkpoints=1)
    as_if_killed_after(directory, 4)
    (directory / "checkpoints" / "step_000004" / "driver.json").write_text("{}")
    with pytest.raises(RunError, match="all 1 checkpoints are damaged"):
        run(resume=True)


@pytest.mark.slow
def test_a_finished_run_with_more_steps_goes_on_from_its_last_checkpoint(run: Run):
    """Its schedule is that of the new length, from there on."""
    longer = run("longer", run__steps=8, trainer__schedule="constant")
    assert same_weights(
        run("grown", trainer__schedule="constant"), run("grown", resume=True, trainer__schedule="constant")
    )
    grown = run("grown", resume=True, run__steps=8, trainer__schedule="constant")
    assert steps_of(grown) == list(range(9))
    assert same_weights(longer, grown)
    assert json.loads((grown / "final" / FINAL_MANIFEST).read_text())["step"] == 8
    assert {path.name for path in grown.iterdir()} == {path.name for path in longer.iterdir()}
    cosine = run("cosine")
    run("cosine", resume=True, run__steps=8)
    assert rates_of(cosine) == rates_of(run("four"))[:4] + rates_of(run("eight", run__steps=8))[4:]


@pytest.mark.slow
def test_a_finished_run_that_is_killed_while_it_goes_on_is_not_finished(run: Run, monkeypatch):
    def die(*args: Any) -> Path:
        raise KeyboardInterrupt

    run("grown")
    with monkeypatch.context() as patch:
        patch.setattr("rlflow.driver.run.write_final", die)
        with pytest.raises(RunError, match="checkpoint of step 6"):
            run("grown", resume=True, run__steps=6)
    grown = run("grown", resume=True, run__steps=6)
    assert json.loads((grown / "final" / FINAL_MANIFEST).read_text())["step"] == 6


@pytest.mark.slow
def test_a_run_goes_on_that_was_written_before_the_recipe_had_all_of_its_blocks(run: Run):
    directory = run()
    as_if_killed_after(directory, 2)
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
    later = [name for name in Recipe.model_fields if name not in ("evaluation", "stage") and name not in OLDEST_BLOCKS]
    assert later
    (directory / "recipe.yaml").write_text(yaml.safe_dump({name: recipe[name] for name in recipe if name not in later}))
    assert same_weights(run(resume=True), run("whole"))
    (directory / "recipe.yaml").write_text(yaml.safe_dump({name: recipe[name] for name in OLDEST_BLOCKS[:-1]}))
    with pytest.raises(RecipeError, match="is not empty and no run of rlflow's"):
        run(resume=True)


def test_fewer_steps_than_are_trained_are_refused(run: Run):
    run()
    with pytest.raises(DataError, match=r"has trained 4 steps and run.steps is 3, .* run.steps=7 trains 3 more"):
        run(resume=True, run__steps=3)


def test_the_longer_of_two_lengths_is_known():
    def recipe_of(**block: Any) -> Recipe:
        return Recipe.model_construct(run=Recipe.model_fields["run"].default.model_copy(update=block))

    before = length_of(recipe_of(steps=4, stop_at_score=0.5))
    assert not lasts_longer(before, recipe_of(steps=4, stop_at_score=0.5))
    assert not lasts_longer(before, recipe_of(steps=3, stop_at_score=0.4))
    assert lasts_longer(before, recipe_of(steps=5, stop_at_score=0.5))
    assert lasts_longer(before, recipe_of(steps=4, stop_at_score=0.6))
    assert lasts_longer(before, recipe_of(steps=4))
    assert lasts_longer(before, recipe_of(epochs=1.0, stop_at_score=0.5))
    assert lasts_longer(length_of(recipe_of(epochs=1.0)), recipe_of(epochs=1.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"data__train__path": "other.jsonl"}, "data.train has other rows"),
        ({"data__prompts_per_step": 3}, "data.prompts_per_step was 4, is 3"),
        ({"data__train__rows": 8}, r"data.train.rows was null, is 8"),
        ({"data__shuffle": False}, "data.shuffle was true, is false"),
        ({"run__seed": 1}, "run.seed was 0, is 1"),
        ({"trainer__optimizer__kind": "muon"}, "trainer.optimizer.kind was adamw, is muon"),
        ({"model__characters": "0123456789=+"}, r"model.characters was 0123456789\+=, is 0123456789=\+"),
    ],
    ids=str,
)
def test_what_the_checkpoints_take_for_granted_cannot_change(run: Run, tmp_path: Path, overrides: dict, says: str):
    write_rows(tmp_path / "other.jsonl", answer="{}0")
    directory = run()
    as_if_killed_after(directory, 2)
    before = (directory / "recipe.yaml").read_bytes()
    if "data__train__path" in overrides:
        overrides = {"data__train__path": str(tmp_path / "other.jsonl")}
    with pytest.raises(DataError, match=rf"run has checkpoints that this recipe cannot go on from:\n(.*\n)*  {says}"):
        run(resume=True, **overrides)
    assert (directory / "recipe.yaml").read_bytes() == before
    assert steps_of(directory) == [0, 1, 2, 3, 4]


def test_the_same_rows_elsewhere_and_another_learning_rate_are_told_and_go_on(run: Run, tmp_path: Path, capsys):
    directory = run()
    as_if_killed_after(directory, 2)
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    capsys.readouterr()
    run(resume=True, data__train__path=str(tmp_path / "moved.jsonl"), trainer__learning_rate=1e-3, run__save_every=1)
    said = capsys.readouterr().err
    assert f"resumed with another recipe: data.train.path was {tmp_path}/rows.jsonl, is {tmp_path}/moved.jsonl" in said
    assert "trainer.learning_rate was 0.01, is 0.001" in said and "run.save_every was 2, is 1" in said
    assert steps_of(directory) == [0, 1, 2, 3, 4]
    assert yaml.safe_load((directory / "recipe.yaml").read_text())["trainer"]["learning_rate"] == 1e-3
    run(resume=True, data__train__path=str(tmp_path / "moved.jsonl"), trainer__learning_rate=5e-3, run__save_every=1)
    assert "is left as it is, although trainer.learning_rate was 0.001, is 0.005" in capsys.readouterr().err


def test_a_changed_row_changes_the_sum_and_its_file_name_does_not(tmp_path: Path):
    def sum_of(path: Path) -> str:
        return sum_of_rows([read_table(SourceBlock(path=str(path)))])

    one = write_rows(tmp_path / "one.jsonl")
    assert sum_of(one) == sum_of(Path(shutil.copy(one, tmp_path / "two.jsonl")))
    lines = one.read_text().splitlines(keepends=True)
    one.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert sum_of(one) != sum_of(tmp_path / "two.jsonl")
    one.write_text("".join([*lines[:-1], lines[-1].replace('"12"', '"13"')]))
    assert sum_of(one) != sum_of(tmp_path / "two.jsonl")


def test_another_reward_function_is_told_and_a_secret_is_not(tmp_path: Path):
    plugin = tmp_path / "reward.py"
    plugin.write_text("def score(): ...\n")
    directory = tmp_path / "run"
    (directory / "checkpoints" / "step_000001").mkdir(parents=True)

    def recipe_of(**args: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "algorithm": {"name": "grpo", "group_size": 2},
                "run": {"output_dir": str(directory), "steps": 1},
                "data": {"train": {"path": "rows.jsonl"}},
                "model": {"path": "org/model"},
                "rewards": [{"plugin": f"{plugin}:score", "args": args}],
            }
        )

    recipe = recipe_of(api_key="one", url="http://a")
    write_recipe(recipe, Inputs.of(recipe, {}), directory)
    assert changes_since(recipe, Inputs.of(recipe, {}), directory) == []
    plugin.write_text("def score(): return [1.0]\n")
    other = recipe_of(api_key="two", url="http://b")
    assert changes_since(other, Inputs.of(other, {}), directory) == [
        "rewards.0.args.url was http://a, is http://b",
        "rewards.0.plugin has another content",
    ]


def test_another_algorithm_is_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    recipes = [
        Recipe.model_validate(
            {
                "algorithm": {"name": name, "group_size": 2},
                "run": {"output_dir": str(tmp_path), "steps": 1},
                "data": {"train": {"path": "rows.jsonl"}},
                "model": {"path": "org/model"},
                "rewards": [{"name": "exact_match"}],
            }
        )
        for name in ("grpo", "rloo")
    ]
    nothing = Inputs({}, {}, {})
    write_recipe(recipes[0], nothing, tmp_path)
    with pytest.raises(DataError, match=r"algorithm.name was grpo, is rloo\nSet it back, or start another run"):
        changes_since(recipes[1], nothing, tmp_path)


@pytest.mark.slow
def test_a_final_that_was_changed_is_noticed_by_whoever_starts_from_it(run: Run, tmp_path: Path):
    from rlflow.cli.main import main

    directory = run()
    weights = directory / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    start = {"model": {"path": str(directory / "final"), "architecture": None, "characters": None}}
    with pytest.raises(DataError, match=r"model.path: .*final/model.safetensors: differs from the manifest.*--resume"):
        run("next", **start)
    assert not (tmp_path / "next").exists()
    assert main(["export", str(directory), str(tmp_path / "copy")]) == 2
    shutil.rmtree(directory / "final")
    repaired = run(resume=True)
    assert main(["export", str(repaired), str(tmp_path / "copy")]) == 0
    run("next", **start)


@pytest.mark.slow
def test_what_a_killed_export_left_does_not_get_into_final(run: Run, tmp_path: Path):
    directory = run()
    (directory / ".final.writing").mkdir()
    (directory / ".final.writing" / "model-00001-of-00002.safetensors").touch()
    shutil.rmtree(directory / "final")
    run(resume=True)
    assert not (directory / ".final.writing").exists()
    assert not (directory / "final" / "model-00001-of-00002.safetensors").exists()


def test_an_older_final_counts_as_finished(run: Run):
    directory = run()
    (directory / "final" / FINAL_MANIFEST).unlink()
    recipe = Recipe.model_validate(yaml.safe_load((directory / "recipe.yaml").read_text()))
    assert is_finished(recipe)
    with pytest.raises(CheckpointError):
        (directory / "final" / FINAL_MANIFEST).write_text("{}")
        from rlflow.checkpoint import verify_model

        verify_model(directory / "final")
