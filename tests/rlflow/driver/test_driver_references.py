"""Rows whose references no reward can use are told before anything starts, and left out where that is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlflow.data.errors import DataError
from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.driver import references, run
from rlflow.driver.references import check_sources, reject_references
from rlflow.recipe import Recipe

ROWS = [
    {"prompt": "1+1", "solution": "2"},
    {"prompt": "1/0", "solution": "1/0"},
    {"prompt": "all", "solution": r"\frac{1}{"},
    {"prompt": "sum", "solution": r"\sum_{k=1}^n k"},
    {"prompt": "two", "solution": {"style": "rule", "ground_truth": "2"}},
    {"prompt": "who", "solution": None},
]


def recipe_of(directory: Path, rows: list[dict], rewards: list[dict], **source: object) -> Recipe:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "algorithm": {"name": "grpo", "group_size": 2},
            "model": {"characters": "0123456789+=/", "architecture": {"model_type": "qwen3"}},
            "data": {"train": {"path": str(path), **source}, "prompts_per_step": 1},
            "rewards": rewards,
            "run": {"steps": 1, "output_dir": str(directory / "run")},
        }
    )


@pytest.mark.slow
def test_file_row_reference_and_remedy_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        check_sources(recipe_of(tmp_path, ROWS, [{"name": "math_accuracy"}]))
    assert str(raised.value).splitlines() == [
        f"{tmp_path}/rows.jsonl: 2 bad rows, and max_bad_rows is 0.",
        "  row 2: math_accuracy cannot use the reference '1/0': it has no value: a division by zero, sides that "
        "differ, or a number too large to be written down",
        r"  row 3: math_accuracy cannot use the reference '\\frac{1}{': it cannot be parsed as mathematics",
        "Repair them, or leave them out with `max_bad_rows: 2` in this source.",
    ]


def test_bad_references_are_left_out_where_bad_rows_may_be(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ROWS, [{"name": "cosine", "args": {"max_tokens": 9}}], max_bad_rows=2)
    check_sources(recipe)
    tokenizer = build_character_tokenizer("0123456789+=/abcdefghijklmnopqrstuvwxyz")
    prompts = load_prompts(recipe.data.train, recipe.data, tokenizer, 0, reject_references(recipe.rewards))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["1+1", "sum", "two", "who"]
    assert [row.row for row in prompts.skipped] == [2, 3]


def test_a_source_without_references_names_its_columns(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [{"prompt": "1+1", "answer": "2"}], [{"name": "last_number"}])
    with pytest.raises(DataError, match=r"last_number needs a column `solution`, and the rows have prompt, answer"):
        check_sources(recipe)


def test_rewards_that_read_no_reference_ask_for_none(tmp_path: Path) -> None:
    check_sources(recipe_of(tmp_path, [{"prompt": "1+1"}], [{"name": "boxed_format"}]))


def test_nothing_is_started_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start_ray", lambda recipes: pytest.fail("Ray was started"))
    with pytest.raises(DataError, match="row 2"):
        run.run_recipes([recipe_of(tmp_path, ROWS[:2], [{"name": "math_accuracy"}])])


def test_what_is_not_parsed_in_time_is_taken_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "DEADLINE_S", 0.01)
    monkeypatch.setattr(references, "_parsed", {})
    check_sources(recipe_of(tmp_path, ROWS[2:4], [{"name": "math_accuracy"}]))
    assert references._parsed == {}
