"""What is saved, published atomically, verified on load.

    checkpoints/step_000012/   state-*.safetensors (a file a rank), driver.json, manifest.json (sha256 a file); PPO's
                               critic has its own in critic/
    checkpoints/latest, best   links

A checkpoint is written under a temporary name, flushed to disk and renamed: what has the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
DRIVER = "driver.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged or none is left: which file, and what to do."""


def step_directory(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def publish(root: Path, step: int, driver_state: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Writes a checkpoint and makes it ``latest``.

    Args:
        root: The run's ``checkpoints`` directory.
        driver_state: JSON-able: data cursor, policy version, counters.
        write: Puts the trainers' state into the directory it is given.

    Raises:
        OSError: Writing failed (a full disk, say); nothing of the attempt is left and older checkpoints stand.
    """
    target = step_directory(root, step)
    temporary = root / f".{target.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        (temporary / DRIVER).write_text(json.dumps(driver_state, indent=1) + "\n")
        written = sorted(temporary.rglob("*"))
        files = {str(path.relative_to(temporary)): path for path in written if path.is_file()}
        manifest = {name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1) + "\n")
        for path in [*written, temporary / MANIFEST, temporary]:
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _flush(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    link(root, "latest", target)
    return target


def verify(directory: Path) -> None:
    """Raises CheckpointError unless every file is there with the size and sha256 of the manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: unreadable ({error})") from error
    for name, wanted in manifest.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != wanted["bytes"] or _sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{path}: differs from the manifest; it was truncated or changed")


def newest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each damaged one is warned of. None when there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints and all of them are damaged: a run never restarts silently at step 0.
    """
    candidates = sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)
    for path in candidates:
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"checkpoint {path.name} is damaged and left aside: {error}")
            continue
        return path
    if candidates:
        raise CheckpointError(
            f"{root}: all {len(candidates)} checkpoints are damaged; move the directory away to start anew"
        )
    return None


def read_driver_state(directory: Path) -> dict[str, Any]:
    return json.loads((directory / DRIVER).read_text())


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the one ``best`` points to."""
    best = (root / "best").resolve() if (root / "best").is_symlink() else None
    for path in sorted(root.glob("step_*"))[:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)


def link(root: Path, name: str, target: Path) -> None:
    """Points ``root/name`` at a sibling, atomically."""
    temporary = root / f".{name}.link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, root / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
