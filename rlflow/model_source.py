"""What a user names, a run, a checkpoint, a model, an adapter, as a directory that transformers, PEFT and vLLM load.

runs/x                          final/ of its last finished stage; of a checkpoint with checkpoint=
runs/x/grpo                     final/ of this stage
runs/x/checkpoints/step_000012  written once as a model, under runs/x/exports/step_000012
a directory, an adapter's       itself
organisation/name               the hub's, which transformers fetches
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rlflow.checkpoint import (
    DRIVER,
    CheckpointError,
    DiskError,
    link_target,
    newest_valid,
    saved_steps,
    step_directory,
    verify_checkpoint,
    verify_model,
)
from rlflow.data.errors import DataError, nearest_beside
from rlflow.driver.args_json import read_args
from rlflow.driver.errors import RunError
from rlflow.driver.final import is_export_of, write_export
from rlflow.driver.past_runs import (
    CHECKPOINTS,
    FINAL,
    find_directory,
    leaves_rows,
    model_of,
    name_of,
    read_run,
    stages_of,
)
from rlflow.driver.resuming import RECIPE
from rlflow.progress import ProgressBar
from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.adapter_files import base_of, is_adapter, read_config
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.model_files import files_problem
from rlflow.recipe.sample_blocks import ROWS_FILE

EXPORTS = "exports"
"""In a stage's directory."""
_STEP = re.compile(r"step_\d{6,}")
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOCK_S = 3600.0
"""How long one waits for another process that writes the same export."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model or an adapter, and the run that it comes from."""

    directory: Path | None
    """A Hugging Face directory, or an adapter's as PEFT writes it; None of a hub id, which transformers fetches."""
    base: str | None
    """Of an adapter: path or hub id of the model that it was trained on."""
    name: str
    """What a server calls it: the run's, or the last part of the path."""
    run: Path | None
    """The directory of the stage that it comes from."""
    recipe: Recipe | None
    """That stage's: sampling, system message, the template's date, rewards."""
    hub_id: str | None = None
    step: int | None = None
    """Of the checkpoint that it is."""

    @property
    def path(self) -> str:
        """What ``from_pretrained`` takes."""
        return str(self.directory) if self.directory is not None else str(self.hub_id)

    @property
    def system(self) -> str | None:
        """The system message that it was trained with; None where there was none, or nobody knows."""
        if self.recipe is not None:
            return self.recipe.data.system
        said = {} if self.directory is None else read_args(self.directory)
        return said.get("system") if isinstance(said.get("system"), str) else None

    @property
    def is_adapter(self) -> bool:
        """Whether it needs its base."""
        return self.directory is not None and is_adapter(self.directory)


def find_model(
    name: str, *, checkpoint: str | None = None, output: Path | None = None, tell: Tell | None = None
) -> ModelSource:
    """Finds what ``name`` stands for; a training checkpoint becomes a model's directory first, once.

    Args:
        name: A run, a stage of one, a checkpoint, a model's or an adapter's directory, or a hub id.
        checkpoint: Of a run: ``best``, ``latest`` or a step's number; its ``final/`` when left out.
        output: A new directory for what is made of a checkpoint, in the place of the run's ``exports/``.
        tell: Hears what was chosen and what is under way; stderr when left out.

    Raises:
        DataError: There is no such thing, it is not whole, or another version of rlflow wrote it; with a remedy.
        RunError: What is made of a checkpoint cannot be written.
    """
    finder = _Finder(tell or _tell_on_stderr, output)
    path = Path(os.path.expanduser(name))
    if not path.exists():
        return _of_hub(name, checkpoint)
    if path.is_file():
        raise DataError(f"{path} is a file: name a run, a checkpoint, or a model's directory")
    if _is_checkpoint(path):
        if checkpoint is not None:
            raise DataError(f"{path} is a checkpoint itself: leave out --checkpoint, or name its run")
        return finder.of_checkpoint(path.parent.absolute() / path.resolve().name)
    if is_adapter(path) or (path / "config.json").is_file():
        if checkpoint is not None:
            raise DataError(f"{path} is a model's directory, and --checkpoint is of a run: leave it out")
        return finder.of_directory(path)
    return finder.of_run(path, checkpoint)


class _Finder:
    """Looks through runs; it says what it chooses."""

    def __init__(self, tell: Tell, output: Path | None) -> None:
        self.tell, self.output = tell, output

    def of_run(self, path: Path, checkpoint: str | None) -> ModelSource:
        stages = list(stages_of(path))
        if not stages and checkpoint is None and (path / FINAL).is_dir():
            return self.of_directory(path / FINAL)
        if not stages:
            raise DataError(f"{path} holds no run and no model{_what_is_there(path)}")
        if not (stages := [stage for stage in stages if not leaves_rows(stage)]):
            raise DataError(f"{path} has sampled answers and left no model: train on {path / ROWS_FILE}")
        kept = [stage for stage in stages if _has(stage, checkpoint)]
        stage = kept[-1] if kept else stages[-1]
        if len(stages) > 1:
            why = "finished" if checkpoint is None else "with checkpoints"
            names = ", ".join(one.name for one in stages)
            self.tell(f"{path} has the stages {names}: takes {stage.name}, the last {why}")
        if checkpoint is not None:
            return self.of_checkpoint(self._chosen(stage, checkpoint))
        if not kept:
            raise DataError(_unfinished(stage, self.tell))
        return self.of_directory(stage / FINAL)

    def _chosen(self, stage: Path, checkpoint: str) -> Path:
        """The checkpoint's directory."""
        root = stage / CHECKPOINTS
        steps = saved_steps(root)
        listed = f"it keeps {', '.join(map(str, steps))}" if steps else "it keeps none"
        if checkpoint == "latest" and steps:
            newest = _newest_whole(stage, self.tell)
            if newest is None:
                raise DataError(f"{stage}: {_none_whole(stage)}")
            return newest
        if checkpoint == "best":
            best = link_target(root, "best")
            if best is None:
                reason = "a checkpoint is the best where the recipe evaluates"
                raise DataError(f"{stage} has no best checkpoint ({reason}): --checkpoint latest, or a step; {listed}")
            return best
        number = checkpoint.removeprefix("step_")
        if number.isdecimal() and int(number) in steps:
            return step_directory(root, int(number))
        if checkpoint == "latest" or number.isdecimal():
            raise DataError(
                f"{stage} has no checkpoint {checkpoint}: {listed}; run.save_every and run.keep_checkpoints say which"
            )
        raise DataError(f"--checkpoint {checkpoint}: write best, latest or a step's number; {listed}")

    def of_checkpoint(self, path: Path) -> ModelSource:
        run = path.parent.parent
        if not (run / RECIPE).is_file():
            raise DataError(f"{path} is without its run: there is no {run / RECIPE}. Name it where the run wrote it")
        try:
            recipe = read_run(run)
        except DataError as error:
            remedy = (
                f"use that version; {run / FINAL} needs no recipe" if (run / FINAL).is_dir() else "use that version"
            )
            raise DataError(f"{error}: {remedy}") from error
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            raise DataError(f"{error}: name another checkpoint of {run}") from error
        model = model_of(recipe, run)
        if self.output is not None:
            directory = self._write(self.output, run, path, recipe, model)
        else:
            directory = self._exported(run, path, recipe, model)
        step = int(path.name.removeprefix("step_"))
        return replace(_source(directory, name_of(run, recipe)), run=run, recipe=recipe, step=step)

    def of_directory(self, path: Path) -> ModelSource:
        """A model or an adapter; where a run wrote it, that run beside it."""
        inside = path.absolute()
        run = inside.parent.parent if inside.parent.name == EXPORTS else inside.parent
        is_of_run = inside.name == FINAL or inside.parent.name == EXPORTS
        if not is_of_run or not (run / RECIPE).is_file():
            return _source(path, inside.name)
        try:
            recipe = read_run(run)
        except DataError as error:
            self.tell(f"{path} is used without its run's settings: {error}")
            return replace(_source(path, run.name), run=run)
        return replace(_source(path, name_of(run, recipe)), run=run, recipe=recipe)

    def _exported(self, run: Path, saved: Path, recipe: Recipe, model: ModelBlock) -> Path:
        """The checkpoint's directory under the run's exports, or in a temporary one where nobody may write there."""
        target = run / EXPORTS / saved.name
        if is_export_of(target, saved):
            return target
        try:
            with _alone_in(target.parent, self.tell):
                if is_export_of(target, saved):
                    return target
                return self._write(target, run, saved, recipe, model)
        except PermissionError:
            pass
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
        temporary = Path(tempfile.mkdtemp(prefix="rlflow-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        self.tell(f"{run} is read-only: the model of {saved.name} is in {temporary} until this command ends")
        return self._write(temporary / saved.name, run, saved, recipe, model)

    def _write(self, target: Path, run: Path, saved: Path, recipe: Recipe, model: ModelBlock) -> Path:
        self.tell(f"writes {saved.name} of {run} as a model to {target}")
        with ProgressBar("reading", "weights") as bar:
            try:
                return write_export(target, run, saved, recipe, model, bar.update)
            except DiskError as error:
                raise RunError(str(error)) from error
            except (ValueError, ImportError) as error:
                raise DataError(f"{saved} cannot be made a model: {error}") from error


def _of_hub(name: str, checkpoint: str | None) -> ModelSource:
    """
    Raises:
        DataError: It can only be a path, and nothing is there.
    """
    if not is_hub_id(name):
        path = Path(os.path.expanduser(name))
        raise DataError(f"there is no {path}: name a run, a checkpoint, or a model's directory.{nearest_beside(path)}")
    if checkpoint is not None:
        raise DataError(f"{name} is no directory here, and --checkpoint is of a run: leave it out, or name the run")
    return ModelSource(directory=None, base=None, name=name.rpartition("/")[2], run=None, recipe=None, hub_id=name)


def _source(directory: Path, name: str) -> ModelSource:
    """A directory that holds a model or an adapter.

    Raises:
        DataError: It is damaged.
    """
    try:
        verify_model(directory)
        base = _base_of(directory) if is_adapter(directory) else None
    except CheckpointError as error:
        raise DataError(
            f"{error}: copy it again; a run writes a final/ that was removed again with --resume"
        ) from error
    except ValueError as error:
        raise DataError(str(error)) from error
    for path in {directory, Path(base or directory)}:
        if path.is_dir() and (problem := files_problem(path)):
            raise DataError(problem)
    return ModelSource(directory=directory, base=base, name=name, run=None, recipe=None)


def _base_of(adapter: Path) -> str | None:
    """The base model of an adapter: where its config says, or else where args.json does, or beside the adapter's run.

    Raises:
        ValueError: The adapter's config cannot be read.
    """
    named = [base_of(read_config(adapter)), read_args(adapter).get("model")]
    named = [name for name in named if isinstance(name, str) and name]
    found = (find_directory(name, adapter.absolute().parent) for name in named)
    return next((path for path in found if path is not None), None) or next(
        (name for name in named if is_hub_id(name)), named[0] if named else None
    )


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a training checkpoint, whole or not."""
    is_named = path.absolute().parent.name == CHECKPOINTS and _STEP.fullmatch(path.resolve().name) is not None
    return is_named or (path / DRIVER).is_file()


def _has(stage: Path, checkpoint: str | None) -> bool:
    """Whether the stage has what is asked for: ``final/``, or checkpoints."""
    return (stage / FINAL).is_dir() if checkpoint is None else bool(saved_steps(stage / CHECKPOINTS))


def _unfinished(stage: Path, tell: Tell) -> str:
    """What to do about a run that has no ``final/``."""
    finish = "`rlflow run RECIPE --resume` finishes it"
    if not saved_steps(stage / CHECKPOINTS):
        return f"{stage} has not finished and saved nothing: {finish}"
    newest = _newest_whole(stage, tell)
    if newest is None:
        return f"{stage} has not finished, there is no {FINAL}/, and {_none_whole(stage)}"
    choice = f"--checkpoint {int(newest.name.removeprefix('step_'))} is its newest whole checkpoint"
    return f"{stage} has not finished, there is no {FINAL}/: {choice}; {finish}"


def _newest_whole(stage: Path, tell: Tell) -> Path | None:
    """The newest checkpoint that verifies, each damaged one told of; None where every one is damaged."""
    try:
        return newest_valid(stage / CHECKPOINTS, tell)
    except CheckpointError:
        return None


def _none_whole(stage: Path) -> str:
    """What to do about a run whose checkpoints are all damaged, from which no run resumes."""
    root = stage / CHECKPOINTS
    return f"no checkpoint is whole: move {root} away, then `rlflow run RECIPE --resume` starts anew"


def _what_is_there(path: Path) -> str:
    """The end of a message about a directory that is no run and no model."""
    if path.absolute().name == CHECKPOINTS and (path.absolute().parent / RECIPE).is_file():
        return f": name its run, {path.parent}, and --checkpoint"
    if (path / RECIPE).is_file():
        return (
            f": a run that saved nothing has its {RECIPE} alone; rlflow run {shlex.quote(str(path / RECIPE))} makes one"
        )
    patterns = (f"*/{RECIPE}", f"*/*/{RECIPE}", f"*/{FINAL}")
    runs = sorted({str(found.parent) for pattern in patterns for found in path.glob(pattern)})
    if runs:
        more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
        return f": name one of the runs in it, {', '.join(runs[:5])}{more}"
    return ": a run's directory has recipe.yaml, a model's config.json, an adapter's adapter_config.json"


@contextmanager
def _alone_in(directory: Path, tell: Tell) -> Iterator[None]:
    """Within, no other process writes exports there.

    Raises:
        OSError: Nobody may write there.
        RunError: Another process holds it for too long.
    """
    directory.mkdir(exist_ok=True)
    with (directory / ".lock").open("ab") as file:
        deadline, is_told = time.monotonic() + _LOCK_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if time.monotonic() > deadline:
                raise RunError(f"{directory} is held by another process for over an hour: end that, then again")
            if not is_told:
                tell(f"waits for another process that writes in {directory}")
            is_told = True
            time.sleep(0.2)
        yield


def _tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr)
