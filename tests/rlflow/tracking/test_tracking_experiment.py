"""What a run is called where people look for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlflow.recipe import Recipe
from rlflow.tracking.experiment import arguments_of

GIVEN = {"project": "p", "name": "n", "group": "g", "tags": ["t"], "notes": "why", "entity": "team"}


@pytest.fixture
def arguments(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    def make(tracker: str, environ: dict[str, str], **blocks: Any) -> dict[str, Any]:
        monkeypatch.setattr("os.environ", environ | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")})
        directory = tmp_path / "runs" / "arithmetic" / "grpo"
        directory.mkdir(parents=True, exist_ok=True)
        return arguments_of(tracker, make_recipe(**blocks), directory)

    return make


def called(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments[key] for key in ("project", "name", "group"))


def test_a_run_is_called_as_the_recipe_says_or_the_environment_or_its_directory(arguments: Any) -> None:
    environ = {"WANDB_PROJECT": "ep", "WANDB_NAME": "en", "WANDB_RUN_GROUP": "eg"}
    assert called(arguments("wandb", {})) == ("rlflow", "grpo", None)
    assert called(arguments("wandb", environ)) == ("ep", "en", "eg")
    assert called(arguments("wandb", environ, experiment=GIVEN)) == ("p", "n", "g")


def test_stages_are_runs_of_one_group_with_names_of_their_own(arguments: Any) -> None:
    assert called(arguments("wandb", {}, stage="grpo")) == ("rlflow", "arithmetic/grpo", "arithmetic")
    assert called(arguments("wandb", {"WANDB_NAME": "en"}, stage="grpo")) == ("rlflow", "en/grpo", "en")
    assert called(arguments("swanlab", {}, stage="grpo", experiment=GIVEN)) == ("p", "n/grpo", "g")


def test_tags_notes_and_entity_are_the_recipes_or_left_to_the_trackers_own_variables(arguments: Any) -> None:
    keys = ("tags", "notes", "entity")
    assert tuple(arguments("wandb", {}, experiment=GIVEN)[key] for key in keys) == (["t"], "why", "team")
    assert tuple(arguments("wandb", {})[key] for key in keys) == (None, None, None)
    swanlab = arguments("swanlab", {}, experiment=GIVEN)
    assert (swanlab["tags"], swanlab["description"], swanlab["workspace"]) == (["t"], "why", "team")


def test_a_run_keeps_its_id_which_may_be_given_and_stages_share_none(arguments: Any) -> None:
    first = arguments("wandb", {})["id"]
    assert arguments("wandb", {"WANDB_RUN_ID": "other"})["id"] == first
    assert arguments("swanlab", {"SWANLAB_RUN_ID": "given"})["id"] == "given"
    assert arguments("trackio", {})["name"] == arguments("trackio", {})["name"]


def test_the_id_that_is_given_to_a_run_of_stages_is_each_stages_with_its_name(arguments: Any) -> None:
    assert arguments("wandb", {"WANDB_RUN_ID": "given"}, stage="grpo")["id"] == "given-grpo"


@pytest.mark.parametrize(
    ("environ", "mode"), [({}, "offline"), ({"SWANLAB_API_KEY": "k"}, None), ({"SWANLAB_MODE": "local"}, "local")]
)
def test_swanlab_is_offline_without_a_key(arguments: Any, environ: dict[str, str], mode: str | None) -> None:
    assert arguments("swanlab", environ)["mode"] == mode


def test_settings_are_told_without_secrets(arguments: Any) -> None:
    for tracker in ("wandb", "tensorboard", "trackio", "swanlab"):
        said = str(arguments(tracker, {}))
        assert "math_accuracy" in said and "hunter2-secret" not in said
