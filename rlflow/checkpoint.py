"""What is saved, published atomically, verified on load.

    checkpoints/step_000012/   state-*.safetensors (a file a rank), driver.json, args.json, manifest.json (sha256 a
                               file); PPO's critic has its own in critic/
    checkpoints/latest, best   links
    final/                     a model or an adapter, and rlflow_manifest.json

A directory is written under a temporary name, flushed to disk and renamed: what has the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FINAL_MANIFEST = "rlflow_manifest.json"
"""Of a model's directory: no other program has a file of this name there."""
DRIVER = "driver.json"
CARD = "README.md"
"""In no manifest: people edit it."""

_STEP = re.compile(r"step_(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint is damaged or none is left: which file, and what to do."""


class DiskError(OSError):
    """Something could not be written: which file, how many bytes were wanted and are free, and why."""


def step_directory(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def saved_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in ``root``, whole or damaged, from the first to the newest."""
    found = [_STEP.fullmatch(path.name) for path in root.glob("step_*") if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def publish(root: Path, step: int, driver_state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Writes a checkpoint and makes it ``latest``.

    Args:
        root: The run's ``checkpoints`` directory.
        driver_state: JSON-able: data cursor, policy version, counters.
        write: Puts the trainers' state into the directory it is given.

    Raises:
        DiskError: Writing failed (a full disk, say); nothing of the attempt is left and older checkpoints stand.
    """

    def write_all(directory: Path) -> None:
        write(directory)
        (directory / DRIVER).write_text(json.dumps(driver_state, indent=1) + "\n", encoding="utf-8")

    target = publish_directory(step_directory(root, step), {"step": step}, write_all)
    link(root, "latest", target)
    return target


def publish_directory(
    target: Path, facts: Mapping[str, Any], write: Callable[[Path], None], manifest: str = MANIFEST
) -> Path:
    """Writes a directory with a manifest and gives it its name; one that has the name already is replaced.

    Args:
        facts: What the manifest says beside its files.
        write: Fills the directory it is given, which is empty.

    Raises:
        DiskError: Writing failed. Nothing of the attempt is left; what ``target`` was before stands.
    """
    temporary, replaced = (target.with_name(f".{target.name}.{end}") for end in ("writing", "replaced"))
    for left_by_a_killed_run in (temporary, replaced):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    try:
        with naming_the_disk(target):
            temporary.mkdir(parents=True)
            write(temporary)
            written = sorted(temporary.rglob("*"))
            files = {str(path.relative_to(temporary)): path for path in written if path.is_file() and path.name != CARD}
            sums = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
            (temporary / manifest).write_text(json.dumps({**facts, "files": sums}, indent=1) + "\n", encoding="utf-8")
            share_weights(temporary)
            for path in [*written, temporary / manifest, temporary]:
                _flush(path)
            if target.exists():
                os.rename(target, replaced)
            os.rename(temporary, target)
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
    return target


def share_weights(directory: Path) -> None:
    """Lets those read weights who may read what is beside them: safetensors writes files for their owner alone."""
    probe = directory / ".mode"
    probe.touch()
    usual = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in directory.rglob("*.safetensors"):
        found = path.stat()
        if found.st_uid == os.geteuid():
            path.chmod(found.st_mode & 0o777 | usual)


@contextmanager
def naming_the_disk(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Turns what goes wrong while ``path`` is written into a DiskError, unless it is one.

    Args:
        wanted: How many bytes are being written, where that is known.
    """
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        size = path.stat().st_size if path.is_file() else 0
        asked = "" if wanted is None else f" of {wanted:,} bytes"
        raise DiskError(f"{path}: writing{asked} failed with {free + size:,} bytes free: {error}") from error


def read_manifest(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a directory; ``files`` maps each file's name to its ``sha256`` and ``bytes``.

    Raises:
        CheckpointError: It cannot be read, or is not what `publish_directory` writes.
    """
    path = directory / name
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        is_sound = bool(files) and all(
            not Path(file).is_absolute()
            and ".." not in Path(file).parts
            and entry.keys() == {"sha256", "bytes"}
            and isinstance(entry["bytes"], int)
            for file, entry in files.items()
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    if not is_sound:
        raise CheckpointError(f"{path}: unreadable (it is no list of files, sums and sizes)")
    return manifest


def verify(directory: Path, name: str = MANIFEST) -> None:
    """Raises CheckpointError unless every file of the manifest is there with its size and sha256."""
    for file, wanted in read_manifest(directory, name)["files"].items():
        path = directory / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{path}: differs from the manifest; it was truncated or changed")


def verify_checkpoint(directory: Path) -> None:
    """As `verify`; the manifest must be of this step, and name every file of the trainers' state."""
    verify(directory)
    manifest = read_manifest(directory)
    step = _STEP.fullmatch(directory.name)
    if step is None or manifest.get("step") != int(step[1]):
        raise CheckpointError(f"{directory / MANIFEST}: is of another step")
    needed = {DRIVER, *(str(path.relative_to(directory)) for path in directory.rglob("state-*"))}
    if unknown := sorted(needed - manifest["files"].keys()):
        raise CheckpointError(f"{directory / MANIFEST}: does not name {unknown[0]}")


def verify_model(directory: Path) -> None:
    """Raises CheckpointError when a model's directory has a manifest, as ``final/`` has, and differs from it."""
    if (directory / FINAL_MANIFEST).exists():
        verify(directory, FINAL_MANIFEST)


def newest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each damaged one is warned of. None when there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints and all of them are damaged: a run never restarts silently at step 0.
    """
    steps = saved_steps(root)
    for step in reversed(steps):
        path = step_directory(root, step)
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warn(f"checkpoint {path.name} is damaged and left aside: {error}")
            continue
        return path
    if steps:
        raise CheckpointError(
            f"{root}: all {len(steps)} checkpoints are damaged; move the directory away to start anew"
        )
    return None


def read_driver_state(directory: Path) -> dict[str, Any]:
    return json.loads((directory / DRIVER).read_text(encoding="utf-8"))


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the one ``best`` points to."""
    best = (root / "best").resolve() if (root / "best").is_symlink() else None
    for step in saved_steps(root)[:-keep]:
        path = step_directory(root, step)
        if path.resolve() != best:
            shutil.rmtree(path)


def link(root: Path, name: str, target: Path) -> None:
    """Points ``root/name`` at a sibling, atomically."""
    temporary = root / f".{name}.link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, root / name)


def link_target(root: Path, name: str) -> Path | None:
    """The checkpoint that ``latest`` or ``best`` points to; None where there is no such link, or nothing behind it."""
    target = (root / name).resolve()
    return root / target.name if (root / name).is_symlink() and target.is_dir() else None


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
