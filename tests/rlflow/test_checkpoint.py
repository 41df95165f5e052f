from __future__ import annotations

import json
import os

import pytest

from rlflow.checkpoint import (
    FINAL_MANIFEST,
    CheckpointError,
    DiskError,
    link,
    newest_valid,
    prune,
    publish,
    publish_directory,
    read_driver_state,
    saved_steps,
    verify,
    verify_model,
)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "driver.json"])
def test_every_flipped_bit_falls_back_or_changes_nothing(tmp_path, name):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            found = newest_valid(tmp_path, lambda _: None)
            assert found == good or (found == bad and name == "manifest.json"), (position, bit)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        '{"step": 2}',
        '{"step": 2, "files": {}}',
        '{"step": 2, "files": []}',
        '{"step": 2, "files": {"driver.json": {}}}',
        '{"step": 2, "files": {"driver.json": "abc"}}',
        '{"step": 2, "files": {"../step_000001/driver.json": {"sha256": "0", "bytes": 1}}}',
        '{"step": 2, "files": {"/etc/hostname": {"sha256": "0", "bytes": 1}}}',
    ],
)
def test_a_manifest_of_another_kind_falls_back(tmp_path, text):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    (bad / "manifest.json").write_text(text)
    assert newest_valid(tmp_path, lambda _: None) == good


def test_a_checkpoint_with_the_state_of_another_run_or_step_falls_back(tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    stray = bad / "state-00000-of-00002.safetensors"
    stray.write_bytes(b"more")
    assert newest_valid(tmp_path, lambda _: None) == good
    stray.unlink()
    bad.rename(tmp_path / "step_000003")
    assert newest_valid(tmp_path, lambda _: None) == good


def test_steps_are_ordered_by_number_and_other_names_are_none(tmp_path):
    for step in (999_999, 1_000_000, 7):
        save(tmp_path, step)
    (tmp_path / "step_abc").mkdir()
    (tmp_path / "step_000009.bak").mkdir()
    assert saved_steps(tmp_path) == [7, 999_999, 1_000_000]
    assert newest_valid(tmp_path, pytest.fail) == tmp_path / "step_1000000"
    prune(tmp_path, keep=1)
    assert saved_steps(tmp_path) == [1_000_000]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_at_zero(tmp_path):
    (save(tmp_path, 1) / "driver.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        newest_valid(tmp_path, lambda _: None)


def test_a_failed_write_leaves_nothing_and_the_older_checkpoint_stands(tmp_path):
    good = save(tmp_path, 1)

    def fail(directory):
        write(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"step_000002: writing failed with [\d,]+ bytes free: .*No space left"):
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


def test_a_model_that_changed_behind_its_manifest_is_told_but_for_its_card(tmp_path):
    final = tmp_path / "final"

    def write_model(directory):
        for name in ("config.json", "model.safetensors", "README.md"):
            (directory / name).write_text(name)

    (tmp_path / ".final.writing").mkdir()
    (tmp_path / ".final.writing" / "left_by_a_killed_run").touch()
    publish_directory(final, {"step": 3}, write_model, FINAL_MANIFEST)
    assert {path.name for path in tmp_path.iterdir()} == {"final"}
    assert {path.name for path in final.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        FINAL_MANIFEST,
    }
    (final / "README.md").write_text("by hand")
    (final / "model.gguf").write_text("made from it")
    verify_model(final)
    (final / "model.safetensors").write_text("model.safetensorz")
    with pytest.raises(CheckpointError, match="safetensors: differs from the manifest"):
        verify_model(final)
    publish_directory(final, {"step": 4}, write_model, FINAL_MANIFEST)
    verify_model(final)
    (final / FINAL_MANIFEST).unlink()
    verify_model(final)


def test_weights_are_readable_by_those_who_may_read_what_is_beside_them(tmp_path):
    def write_model(directory):
        (directory / "config.json").touch()
        (directory / "deeper").mkdir()
        for name in ("model.safetensors", "deeper/value.safetensors"):
            (directory / name).write_bytes(b"weights")
            (directory / name).chmod(0o600)

    usual = os.umask(0o027)
    try:
        publish_directory(tmp_path / "final", {"step": 3}, write_model, FINAL_MANIFEST)
    finally:
        os.umask(usual)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert set(modes) == {"config.json", "model.safetensors", "value.safetensors", FINAL_MANIFEST}
    assert set(modes.values()) == {0o640}


def test_what_is_replaced_stands_when_writing_fails(tmp_path):
    def fail(directory):
        raise OSError(28, "No space left on device")

    path = save(tmp_path, 1)
    with pytest.raises(DiskError):
        publish(tmp_path, 1, {}, fail)
    verify(path)
