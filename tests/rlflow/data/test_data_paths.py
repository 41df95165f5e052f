"""What is said of a path that leads to no data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlflow.data.errors import DataError, nearest_beside
from rlflow.data.files import read_file
from rlflow.data.sources import read_table
from rlflow.recipe import SourceBlock


def test_a_path_that_leads_nowhere_is_not_answered_with_its_own_name(tmp_path: Path):
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "train.jsonl").touch()
    assert nearest_beside(tmp_path / "link.jsonl") == " It is a link to gone.jsonl, which is not there."
    assert nearest_beside(tmp_path / "pipe.jsonl") == " What bears that name is no plain file."
    assert nearest_beside(tmp_path / "trian.jsonl").startswith(" Nearest: train.jsonl")


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.csv"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n")
    with pytest.raises(DataError, match=rf"{name} is a pointer of Git LFS to the data, run `git lfs pull` there"):
        list(read_file(tmp_path / name))


def test_a_directory_that_cannot_be_loaded_is_called_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"It is a directory\. Check id, subset and split") as refused:
        read_table(SourceBlock(path=str(tmp_path)))
    assert "\n" not in str(refused.value)
