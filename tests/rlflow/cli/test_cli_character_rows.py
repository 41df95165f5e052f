"""What is known of a generator's rows without rendering them is what rendering them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlflow.cli import row_checks
from rlflow.cli.row_checks import Reading, read_data
from rlflow.recipe import Recipe, load_recipe

RECIPE: dict[str, Any] = {
    "model": {"characters": "0123456789+=", "architecture": {"model_type": "qwen3"}},
    "data": {"train": {"generator": "arithmetic", "args": {"digits": 1}}, "max_prompt_tokens": 5, "max_tokens": 7},
    "evaluation": {
        "data": {"generator": "arithmetic", "args": {"digits": 1, "split": "heldout"}, "rows": 5},
        "reward": {"name": "exact_match"},
    },
    "run": {"steps": 1},
}
GRPO = {"algorithm": {"name": "grpo", "group_size": 2}, "rewards": [{"name": "exact_match"}]}


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two readings of a recipe: as it is done, and with every row rendered."""

    def readings(*overrides: str, algorithm: dict[str, Any]) -> tuple[Reading, Reading]:
        (recipe,) = load_recipe({**RECIPE, **algorithm}, overrides)
        with monkeypatch.context() as patched:
            patched.setattr(row_checks, "_known_to_fit", lambda *_: None)
            rendered = read_data(recipe, {})
        return read_data(recipe, {}), rendered

    return readings


def refuse(*_: Any) -> None:
    raise AssertionError("no tokenizer is needed")


@pytest.mark.parametrize("algorithm", [GRPO, {"algorithm": {"name": "sft"}}])
def test_rows_that_fit_are_counted_without_a_tokenizer(readings, monkeypatch, algorithm):
    known, rendered = readings(algorithm=algorithm)
    assert known == rendered and known.num_rows == 91 and not known.problems
    assert known.row is not None and set(known.row) == {"response", "solution"}
    (recipe,) = load_recipe({**RECIPE, **algorithm})
    monkeypatch.setattr(row_checks, "load_tokenizer", refuse)
    assert read_data(recipe, {}) == rendered


@pytest.mark.parametrize("algorithm", [GRPO, {"algorithm": {"name": "sft"}}])
@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("model.characters=012345678+=", "data.train", "9"),
        ("data.max_prompt_tokens=3", None, "max_prompt_tokens"),
        ("data.max_tokens=5", None, "max_tokens"),
        ("data.train.args.template='{a}{op}{b} is'", "data.train", "s"),
        ("data.system=Add.", None, "A"),
    ],
)
def test_what_does_not_fit_is_told_as_rendering_tells_it(readings, algorithm, override, key, says):
    known, rendered = readings(override, algorithm=algorithm)
    assert known == rendered
    if key is not None:
        assert any(where == key and says in problem for where, problem in known.problems)


def test_a_stage_that_goes_on_from_a_model_of_characters_has_its_tokenizer(monkeypatch, tmp_path: Path):
    stages = [{"name": "sft", "algorithm": {"name": "sft"}}, {"name": "grpo", **GRPO}]
    sft, grpo = load_recipe({**RECIPE, "stages": stages, "run": {"steps": 1, "output_dir": str(tmp_path)}})
    monkeypatch.setattr(row_checks, "load_tokenizer", refuse)
    to_come: dict[str, Recipe] = {f"{sft.run.output_dir}/final": sft}
    assert read_data(grpo, to_come).num_rows == 91
