"""A working directory for the tests of the page's server."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/ and recipes/ of its own, and a place for what the server keeps."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("RLFLOW_UI_TOKEN", raising=False)
    here = tmp_path / "here"
    (here / "runs").mkdir(parents=True)
    (here / "recipes").mkdir()
    monkeypatch.chdir(here)
    return here
