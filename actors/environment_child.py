"""The process that episodes' environments are forked from: ``python -P -m rlflow.actors.environment_child <fd>``.

It imports what the recipe names once, and then a process of its own for each episode costs a few milliseconds. The
user's code runs in those alone, but for the import. Standard output belongs to the environments.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from rlflow.actors.environment_wire import MAX_ANSWER_BYTES, EnvironmentSetup, read_with_descriptor
from rlflow.actors.reward_child import die_with
from rlflow.actors.reward_wire import frame, read_frame
from rlflow.environments.loading import load_environment
from rlflow.environments.protocol import Environment, EnvironmentFault
from rlflow.environments.session import Session, warm_up

Make = Callable[[], Environment]


def main(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    first = read_frame(connection)
    if first is None:
        return
    setup: EnvironmentSetup = pickle.loads(first[1])
    die_with(setup.parent_pid)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        make = load_environment(setup.name, setup.plugin, setup.tools, setup.args)
    except EnvironmentFault as error:
        _answer(connection, first[0], {"fatal": str(error)})
        return
    # What is here now stays shared with the processes that are forked from it: also what an episode's first needs.
    warm_up()
    gc.collect()
    gc.freeze()
    # From here on no code of the user's runs in this process: it has the time to end what episodes have started.
    alive: set[int] = set()
    signal.signal(signal.SIGTERM, lambda *_: _end_all(alive))
    die_with(setup.parent_pid, signal.SIGTERM)
    _answer(connection, first[0], {"ready": True})
    while (request := read_with_descriptor(connection)) is not None:
        call_id, body, theirs = request
        if theirs is None:
            _end(pid := pickle.loads(body))
            alive.discard(pid)
            _answer(connection, call_id, {"ended": True})
            continue
        pid = os.fork()
        if pid == 0:
            _serve(theirs, connection, make, setup)
        alive.add(pid)
        os.close(theirs)
        _answer(connection, call_id, {"pid": pid})
    _end_all(alive)


def _serve(descriptor: int, of_source: socket.socket, make: Make, setup: EnvironmentSetup) -> None:
    """The life of an episode's process: never returns."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        of_source.close()
        os.setsid()
        die_with(os.getppid())
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
        own_pid, session = os.getpid(), Session(make)
        connection = socket.socket(fileno=descriptor)
        os.register_at_fork(after_in_child=connection.close)
        while (request := read_frame(connection)) is not None:
            said = session.answer(*pickle.loads(request[1]))
            if os.getpid() != own_pid:
                os._exit(0)  # a copy that the environment forked and let return
            _answer(connection, request[0], said)
    finally:
        # Without what the process that it was forked from would do at its end.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _end(pid: int) -> None:
    """Kills an episode's process group. Nobody else waits for it, so that the number stays its own until here."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may not have had the time to have a group
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _end_all(pids: Iterable[int]) -> NoReturn:
    """Kills the process groups of all episodes, and ends this process."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(1)


def _answer(connection: socket.socket, call_id: int, answer: Mapping[str, Any]) -> None:
    body = json.dumps(answer).encode()
    if len(body) > MAX_ANSWER_BYTES:
        most = f"{MAX_ANSWER_BYTES / 2**20:g} MiB"
        body = json.dumps({"error": f"it said {len(body) / 2**20:.1f} MiB, and {most} is the most"}).encode()
    connection.sendall(frame(call_id, body))


if __name__ == "__main__":
    main(int(sys.argv[1]))
