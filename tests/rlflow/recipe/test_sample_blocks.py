"""Stages that sample, and those that name their rows: what is resolved, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlflow.positions import longest_sequences
from rlflow.recipe import RecipeError, load_recipe
from rlflow.recipe.yaml_source import merge

PROMPTS = {"path": "prompts.jsonl", "columns": {"prompt": "question"}, "rows": 5}
RECIPE: dict[str, Any] = {
    "model": {"path": "org/student"},
    "data": {"train": PROMPTS, "prompts_per_step": 2},
    "run": {"output_dir": "/out", "epochs": 1},
}
ANSWERS = {"name": "answers", "algorithm": {"name": "sample"}, "rewards": [{"name": "exact_match"}]}
SFT = {"name": "sft", "algorithm": {"name": "sft"}, "data": {"train": {"stage": "answers", "where": "reward > 0"}}}


def test_a_stage_reads_the_rows_of_the_one_that_it_names_and_goes_on_from_the_last_trained_model():
    names = ("answers", "sft", "more", "again")
    again = merge(SFT, {"name": "again", "data": {"train": {"stage": "more"}}})
    stages = [ANSWERS, SFT, {**ANSWERS, "name": "more"}, again]
    loaded = dict(zip(names, load_recipe({**RECIPE, "stages": stages}), strict=True))
    train: dict[str, Any] = {name: recipe.data.train for name, recipe in loaded.items()}
    assert train["answers"].columns == {"prompt": "question"} and train["answers"].rows == 5
    assert train["sft"].path == "/out/answers/final/rows.jsonl" and train["again"].path == "/out/more/final/rows.jsonl"
    assert train["sft"].columns == {} and train["sft"].rows is None, "what is shared is of the prompts"
    assert train["sft"].where == "reward > 0"
    models = [recipe.model.path for recipe in loaded.values()]
    assert models == ["org/student", "org/student", "/out/sft/final", "/out/sft/final"]
    for recipe in loaded.values():
        assert load_recipe(recipe.model_dump(mode="json")) == [recipe], "what is resolved stays as it is"


def test_what_is_answered_is_as_long_as_prompts_and_answers_and_no_row_is_trained():
    (recipe,) = load_recipe({**RECIPE, "stages": [{**ANSWERS, "rollout": {"max_new_tokens": 7}}]})
    assert longest_sequences(recipe) == {"data.max_prompt_tokens + rollout.max_new_tokens": 1024 + 7}


def test_an_adapter_with_dropout_may_be_shared_with_the_stage_that_trains_it():
    adapter = {"rank": 4, "dropout": 0.1}
    answers, sft = load_recipe({**RECIPE, "model": {"path": "m", "adapter": adapter}, "stages": [ANSWERS, SFT]})
    assert answers.model.adapter == sft.model.adapter


UNREWARDED = {**ANSWERS, "rewards": []}
NEW_MODEL = {"path": None, "architecture": {"model_type": "llama"}, "characters": "ab"}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([SFT], "no stage before this one samples and is called answers: there is none"),
        ([SFT, ANSWERS], "no stage before this one samples and is called answers: there is none"),
        ([{**ANSWERS, "name": "answer"}, SFT], "did you mean answer?"),
        ([{**SFT, "name": "answers", "data": {}}, SFT], "answers trains a model and leaves no rows"),
        ([{**ANSWERS, "model": NEW_MODEL}], "a new one says nothing"),
        ([merge(UNREWARDED, {"algorithm": {"keep": {"form": "pairs"}}})], "are of rewards, and there are none"),
        ([merge(UNREWARDED, {"algorithm": {"keep": {"where": "reward > 1"}}})], "is of rewards, and there are none"),
        ([{**UNREWARDED, "evaluation": {"data": PROMPTS}}], "nothing is trained in this stage"),
    ],
)
def test_what_cannot_be_is_refused_by_name(stages: list[dict[str, Any]], said: str):
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_recipe({**RECIPE, "stages": stages})


def test_an_unknown_stage_is_named_with_file_and_line(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: org/student}\nrun: {epochs: 1}\nstages:\n- name: sft\n  algorithm: {name: sft}\n  data:\n"
        "    train: {stage: answers}\n"
    )
    with pytest.raises(RecipeError, match=r"recipe\.yaml:7: .*data\.train\.stage: no stage before this one"):
        load_recipe(path)
