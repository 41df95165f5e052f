"""Wrong recipes and wrong data: one message with file, key or row and remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlflow.cli.main import main
from tests.local_actors import use_local_actors

PROMPTS = [{"prompt": f"Say {word}.", "solution": word} for word in ("one", "two", "three")]
ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": "Really?"}


@pytest.fixture
def run(tmp_path, tiny_model_dir, monkeypatch, capsys):
    use_local_actors(monkeypatch)

    def run(rows: list[dict], **changes: Any) -> str:
        """Runs a GRPO recipe with changes of top-level blocks. Returns what it said, after checking the rest."""
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe: dict[str, Any] = {
            "run": {"output_dir": str(tmp_path / "out"), "steps": 1},
            "model": {"path": str(tiny_model_dir)},
            "algorithm": {"name": "grpo"},
            "data": {"train": {"path": str(data)}, "max_prompt_tokens": 64},
            "rewards": [{"name": "exact_match"}],
            "rollout": {"engine": "torch", "max_new_tokens": 2},
            "tracking": ["jsonl"],
        }
        for block, value in changes.items():
            if value is None:
                del recipe[block]
            else:
                recipe[block] = recipe[block] | value if isinstance(value, dict) and block in recipe else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        code = main(["run", str(path)])
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists(), "something half-written is left"
        return said

    return run


def offline(name: str) -> dict[str, Any]:
    return {"algorithm": {"name": name}, "rewards": None, "rollout": None}


def test_a_mistyped_key_is_named_with_its_line_and_the_nearest_one(run):
    said = run(PROMPTS, trainer={"learning_rat": 1e-3})
    assert "learning_rat" in said and "learning_rate" in said and "recipe.yaml:" in said


def test_an_algorithm_one_letter_off_is_corrected(run):
    said = run(PROMPTS, algorithm={"name": "gspoo"})
    assert "gspoo" in said and "gspo" in said


def test_a_group_of_one_has_no_baseline(run):
    assert "group_size" in run(PROMPTS, algorithm={"group_size": 1})


def test_updates_must_divide_the_prompts(run):
    said = run(PROMPTS, algorithm={"groups": {"updates_per_step": 3}}, data={"prompts_per_step": 4})
    assert "3 does not divide" in said


def test_a_missing_file_is_named(run, tmp_path):
    assert str(tmp_path / "row.jsonl") in run(PROMPTS, data={"train": {"path": str(tmp_path / "row.jsonl")}})


def test_a_missing_column_is_named_with_those_there_are(run, tmp_path):
    train = {"path": str(tmp_path / "rows.jsonl"), "columns": {"prompt": "question"}}
    said = run(PROMPTS, data={"train": train})
    assert "question" in said and "prompt" in said and "rows.jsonl" in said


def test_an_empty_dataset_is_named(run):
    said = run([])
    assert "rows.jsonl" in said and ("empty" in said or "no rows" in said)


def test_a_model_directory_without_weights_is_named(run, tiny_model_dir, tmp_path):
    directory = tmp_path / "weightless"
    shutil.copytree(tiny_model_dir, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    said = run(PROMPTS, model={"path": str(directory)})
    assert str(directory) in said and "safetensors" in said


def test_prompts_over_the_limit_are_named_with_the_remedy(run):
    said = run(PROMPTS, data={"max_prompt_tokens": 12})
    assert "max_prompt_tokens" in said and "rows.jsonl" in said and "overlong" in said


def test_an_earlier_run_is_back_in_its_place_when_the_next_cannot_start(run, tmp_path):
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "metrics.jsonl").write_text("kept")
    with pytest.raises(AssertionError, match="half-written"):
        run(PROMPTS, data={"max_prompt_tokens": 12})
    assert [path.name for path in earlier.iterdir()] == ["metrics.jsonl"]
    assert not (tmp_path / "out.1").exists()


def test_a_reward_that_does_not_exist_is_corrected(run):
    said = run(PROMPTS, rewards=[{"name": "exact_mach"}])
    assert "exact_mach" in said and "exact_match" in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": [QUESTION, ANSWER], "rejected_messages": [QUESTION, ANSWER]}], "identical"),
        ([{"prompt": "Really?", "chosen": "yes", "rejected": None}], "rejected"),
    ],
)
def test_a_pair_that_is_none_is_named_by_its_row(run, rows, words):
    said = run(rows, **offline("dpo"))
    assert words in said and "row 1" in said


def test_labels_of_one_kind_are_refused(run):
    said = run([{"messages": [QUESTION, ANSWER], "label": True}] * 3, **offline("kto"))
    assert "label true" in said and "both kinds" in said


def test_rewards_are_refused_where_nothing_is_generated(run):
    assert "rewards" in run(PROMPTS, algorithm={"name": "dpo"})


def test_stopping_at_a_score_needs_something_that_passes(run, tmp_path):
    rows = [{"messages": [QUESTION, ANSWER]}]
    evaluation = {"data": {"path": str(tmp_path / "rows.jsonl")}}
    said = run(rows, **offline("sft"), evaluation=evaluation, run={"stop_at_score": 0.5})
    assert "stop_at_score" in said and "evaluation.reward" in said


def test_every_message_names_the_recipe_file(run):
    assert Path("recipe.yaml").name in run(PROMPTS, rewards=[{"name": "exact_mach"}])


def test_a_tracker_that_is_not_installed_is_said_with_what_to_install(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "trackio" else found(name, *a))
    said = run(PROMPTS, tracking=["jsonl", "trackio"])
    assert "recipe.yaml:" in said and "tracking.1" in said and "pip install trackio" in said
    assert len(said.strip().splitlines()) == 1


def test_a_name_of_other_frameworks_for_the_run_is_answered_with_ours(run):
    assert "experiment.name" in run(PROMPTS, run={"run_name": "x"})
