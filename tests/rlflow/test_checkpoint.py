from __future__ import annotations

import json

import pytest

from rlflow.checkpoint import CheckpointError, link, newest_valid, prune, publish, read_driver_state, verify


def write(directory):
    (directory / "state-00000-of-00001.safetensors").write_bytes(b"weights" * 100)


def save(root, step):
    return publish(root, step, {"step": step}, write)


def test_a_published_checkpoint_verifies_and_is_latest(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step_000012"
    assert (tmp_path / "latest").resolve() == path
    verify(path)
    assert read_driver_state(path) == {"step": 12}
    assert newest_valid(tmp_path, pytest.fail) == path


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["state-00000-of-00001.safetensors", "driver.json", "manifest.json"])
def test_any_damage_is_detected_and_falls_back_to_the_checkpoint_before(tmp_path, damage, name):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-5])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    warnings = []
    assert newest_valid(tmp_path, warnings.append) == good
    assert "step_000002" in warnings[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_at_zero(tmp_path):
    (save(tmp_path, 1) / "driver.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        newest_valid(tmp_path, lambda _: None)


def test_a_failed_write_leaves_nothing_and_the_older_checkpoint_stands(tmp_path):
    good = save(tmp_path, 1)

    def fail(directory):
        write(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, 2, {}, fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert newest_valid(tmp_path, pytest.fail) == good


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        path = save(tmp_path, step)
        if step == 2:
            link(tmp_path, "best", path)
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000004", "step_000005"]


def test_the_manifest_lists_every_file_with_its_hash(tmp_path):
    path = save(tmp_path, 3)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"driver.json", "state-00000-of-00001.safetensors"}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
