"""Text files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from rlflow.cli.export import _publish
from rlflow.driver.errors import RunError
from rlflow.text_files import write_text

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there_before_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path / "recipe.yaml", "before")

    def write_half(self: Path, text: str, **options: str) -> None:
        with self.open("w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise FULL

    monkeypatch.setattr(Path, "write_text", write_half)
    for name in ("recipe.yaml", "another.yaml"):
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / name, "afterwards")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("recipe.yaml", "before")]


def test_links_and_pipes_are_written_through(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_an_export_that_does_not_fit_names_the_first_file_alone(tmp_path: Path):
    def copy(_place: Path) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'"), ("c", "d", "the same")])

    with pytest.raises(RunError) as refused:
        _publish(tmp_path / "model", copy)
    said = "[Errno 28] No space left on device: 'a' -> 'b'; name a directory with room where you may write"
    assert str(refused.value) == f"{tmp_path}/model cannot be written: {said}"
