"""A user without a home directory: a number that no passwd file names, without HOME, as OpenShift and `docker run -u`
give it."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

import pytest

from rlflow.data.errors import DataError
from rlflow.doctor.hardware import hub_cache
from rlflow.doctor.packages import check_extensions
from rlflow.doctor.surroundings import check_ray, hub_home
from rlflow.plugins import PluginError, load_plugin
from rlflow.ray_cluster import find_token
from rlflow.tracking.experiment import wandb_mode
from rlflow.tracking.history import StageHistory
from rlflow.tracking.model_card import _recipe
from rlflow.ui.commands import state_directory


@pytest.fixture(autouse=True)
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_number: int) -> Any:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME", "RAY_AUTH_TOKEN", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_what_is_looked_for_in_a_home_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert find_token() == ("", "")
    assert wandb_mode({}) == "offline"
    assert list(check_extensions()) == []
    assert [finding.name for finding in check_ray()] == ["Ray cluster"]
    assert not hub_cache().exists() and not hub_home().exists()


def test_a_name_with_a_tilde_is_a_file_that_is_not_there():
    with pytest.raises(PluginError, match="there is no file"):
        load_plugin("~/mine.py:reward")


def test_the_user_interface_asks_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="set XDG_STATE_HOME"):
        state_directory(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_directory(tmp_path).is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", [None, "/"])
def test_a_model_card_has_the_paths_of_the_recipe(home: str | None, monkeypatch: pytest.MonkeyPatch):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    stage = StageHistory("sft", Path("runs/x"), {"stage": None, "data": {"train": {"path": "/data/rows.jsonl"}}}, ())
    assert "path: /data/rows.jsonl\n" in _recipe(stage)
