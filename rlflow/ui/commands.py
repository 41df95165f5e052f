"""The commands that the page starts: `rlflow run` in a session of its own, so that it outlives the page's server.

What was started is kept outside every run's directory, so that a later server can resume a run as it was begun:

    STATE/20261128-141503-1a2b.json    the command, where it ran, which directories it writes, how it ended
    STATE/20261128-141503-1a2b.log     what it printed
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlflow.data.errors import DataError
from rlflow.driver.run_lock import Holder, holder_of
from rlflow.recipe.yaml_source import dump_value
from rlflow.text_files import write_text
from rlflow.tracking.history import RECIPE
from rlflow.ui.recipes import output_directories
from rlflow.ui.refusal import Refusal
from rlflow.ui.served import Served

RLFLOW = (sys.executable, "-m", "rlflow")
SHOWN = 20
"""So many of the newest commands are listed."""
TOKEN_VARIABLE = "RLFLOW_UI_TOKEN"
"""The server's own; what it starts does not get it."""


@dataclass(frozen=True, slots=True)
class Command:
    """An `rlflow run` that was started from the page."""

    id: str
    arguments: list[str]
    """Of `rlflow`."""
    recipe: str
    """Path of the recipe's file."""
    overrides: list[str]
    directories: list[str]
    """That its stages write to."""
    resumes: bool
    pid: int
    began: str
    """When the process began, in the kernel's count: process ids come again."""
    started: float
    """Seconds since 1970."""
    exit_code: int | None = None
    """None while it runs, and where the server that started it was gone before it ended."""


class Commands:
    """Starts, stops and resumes runs.

    Args:
        state: Where records and logs are kept.
        served: Below which runs may write.
        here: The directory that they are started from.
        program: What `run` and its arguments are given to.
    """

    def __init__(self, state: Path, served: Served, here: Path, program: Sequence[str] = RLFLOW) -> None:
        self._state, self._served, self._here, self._program = state, served, here, program
        self._watching: set[asyncio.Task[None]] = set()

    async def start(
        self, recipe: Path, overrides: Sequence[str], directories: Sequence[Path], *, resumes: bool
    ) -> Command:
        """Starts `rlflow run`.

        Raises:
            Refusal: A directory is not below the served one, or is in use, or no process can be started.
        """
        for directory in directories:
            if self._served.name_of(directory) is None:
                raise Refusal(
                    422,
                    f"the run would write to {directory}, which is not below {self._served.root}: set "
                    f"run.output_dir={self._served.root / recipe.stem}",
                )
            if (holder := holder_of(directory)) is not None and holder.is_here and holder.is_alive:
                raise Refusal(409, f"{directory} is in use by {holder}: stop that, or choose another run.output_dir")
        arguments = ["run", str(recipe), *overrides, *["--resume"] * resumes]
        name = command_id(time.time())
        environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        try:
            self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self._state / f"{name}.log").open("xb") as log:
                process = await asyncio.create_subprocess_exec(
                    *self._program,
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._here,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise Refusal(500, f"the run could not be started: {error}") from error
        command = Command(
            id=name,
            arguments=arguments,
            recipe=str(recipe),
            overrides=list(overrides),
            directories=[str(directory) for directory in directories],
            resumes=resumes,
            pid=process.pid,
            began=Holder.of_process(process.pid).began,
            started=round(time.time(), 3),
        )
        self._write(command)
        task = asyncio.create_task(self._watch(command, process))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
        return command

    async def resume(self, name: str, more: Sequence[str]) -> Command:
        """Goes on with a run as it was started here, or else from the recipe in its directory, which is one stage.

        Args:
            more: Overrides beyond those that it was started with.
        """
        directory = self._served.run(name)
        before = self.of_run(directory)
        if before is not None and Path(before.recipe).is_file():
            recipe, overrides = Path(before.recipe), [*before.overrides, *more]
        else:
            # A run that was moved still names where it was.
            recipe, overrides = self._served.file(name, RECIPE), [f"run.output_dir={dump_value(str(directory))}", *more]
        directories = await asyncio.to_thread(output_directories, recipe, overrides)
        return await self.start(recipe, overrides, directories, resumes=True)

    def stop(self, name: str) -> None:
        """Asks the process that has a run's directory to stop: it writes a checkpoint at the end of its step.

        Raises:
            Refusal: Nobody is at work on it, or on another machine, or it is not ours to stop.
        """
        holder = holder_of(self._served.run(name))
        if holder is None or not holder.is_alive:
            raise Refusal(409, f"{name} is not running")
        if not holder.is_here:
            raise Refusal(409, f"{name} runs on {holder.host}: stop process {holder.pid} there")
        _terminate(holder.pid, holder.began)

    def stop_command(self, command_id: str) -> None:
        """As `stop`, of a command that may have no directory yet."""
        command = self._read(command_id)
        if not is_alive(command):
            raise Refusal(409, "that command has ended")
        _terminate(command.pid, command.began)

    def newest(self) -> list[Command]:
        """The commands that were started last, the newest first."""
        names = sorted((path.stem for path in self._state.glob("*.json")), reverse=True)
        found = []
        for name in names[:SHOWN]:
            with contextlib.suppress(Refusal):
                found.append(self._read(name))
        return found

    def of_run(self, directory: Path) -> Command | None:
        """The newest command that wrote to a directory."""
        for path in sorted(self._state.glob("*.json"), reverse=True):
            with contextlib.suppress(Refusal):
                command = self._read(path.stem)
                if str(directory) in [str(Path(written).resolve()) for written in command.directories]:
                    return command
        return None

    def log(self, command_id: str) -> Path:
        """Where a command's output is."""
        return self._state / f"{self._read(command_id).id}.log"

    def running(self) -> list[Command]:
        return [command for command in self.newest() if is_alive(command)]

    async def _watch(self, command: Command, process: asyncio.subprocess.Process) -> None:
        self._write(replace(command, exit_code=await process.wait()))

    def _write(self, command: Command) -> None:
        write_text(self._state / f"{command.id}.json", json.dumps(asdict(command)) + "\n")

    def _read(self, command_id: str) -> Command:
        if not all(character.isalnum() or character == "-" for character in command_id):
            raise Refusal(404, "there is no such command")
        try:
            return Command(**json.loads((self._state / f"{command_id}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise Refusal(404, f"there is no command {command_id[:100]}") from None


def command_id(now: float) -> str:
    """A name that no other command has; names are in the order in which commands were started."""
    milliseconds = int(now * 1000) % 1000
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{milliseconds:03d}-{secrets.token_hex(2)}"


def is_alive(command: Command) -> bool:
    """Whether the process still runs; a number that has come again is another's."""
    return command.exit_code is None and bool(command.began) and Holder.of_process(command.pid).began == command.began


def state_directory(root: Path) -> Path:
    """Where what is started for a directory is kept: beside no run.

    Raises:
        DataError: The user has no home directory, and names no other place.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    if not base.is_absolute():
        raise DataError(f"{base} is below no home directory: set XDG_STATE_HOME to a directory of yours, or HOME")
    return base / "rlflow" / "ui" / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"


def _terminate(pid: int, began: str) -> None:
    """Sends SIGTERM to a process, and never to another that has got its number. Raises Refusal."""
    try:
        descriptor = os.pidfd_open(pid)
        try:
            if Holder.of_process(pid).began != began:
                raise ProcessLookupError
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        raise Refusal(409, f"process {pid} has ended") from None
    except PermissionError:
        raise Refusal(403, f"process {pid} is another user's: stop it as that user") from None
