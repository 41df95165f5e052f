"""The process in which reward functions run, started by RewardProcess: ``python -m rlflow.actors.reward_child <fd>``.

It reads a set-up, loads the functions, says that it is ready, then answers one call at a time on its main thread
(math-verify keeps its time with SIGALRM). It talks over its own socket: standard output belongs to the functions.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.actors.reward_wire import Request, Setup, frame, read_frame
from rlflow.rewards import RewardError, RewardFunction, load

MAX_MESSAGE = 4000
"""Longer than what is kept of it, so that no secret is cut in two before it can be recognised."""
PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)
    first = read_frame(connection)
    if first is None:
        return
    setup: Setup = pickle.loads(first[1])
    die_with(setup.parent_pid)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    try:
        functions = [load(*function) for function in setup.functions]
    except RewardError as error:
        _answer(connection, first[0], {"fatal": str(error)})
        return
    _answer(connection, first[0], {"ready": True})
    own_pid = os.getpid()
    while (request := read_frame(connection)) is not None:
        answer = _call(functions, request[1])
        if os.getpid() != own_pid:
            os._exit(0)  # a copy that the function forked and let return
        _answer(connection, request[0], answer)


def _call(functions: Sequence[RewardFunction], body: bytes) -> dict[str, Any]:
    """What a function says of its rows: ``scores``, or ``error`` and whether calling it row by row is of ``use``."""
    try:
        request: Request = pickle.loads(body)
        given = list(request.completions)
        scores = functions[request.function](
            request.prompts,
            request.completions,
            [array.array("i", ids).tolist() for ids in request.completion_ids],
            **request.columns,
            **_decoded(request.images),
        )
        if problem := _no_list_of_scores(scores, len(given), list(request.completions) != given):
            return {"error": f"{problem}: return a list, one number (or None) for each completion, in their order"}
        plain = [_plain(score) for score in scores]
        if len(plain) != len(given):
            return {"error": f"returned a {type(scores).__name__} that has no {len(given)} entries: return a list"}
        return {"scores": plain}
    except RewardError as error:
        return {"error": f"cannot be called: {error}"}
    except BaseException as error:  # SystemExit and math-verify's TimeoutException are no Exception
        return {"error": f"raised {_describe(error)}", "retry": True}


def _decoded(images: Sequence[Sequence[bytes]]) -> dict[str, list[list[Any]]]:
    """The columns ``images`` and ``videos``: of each row its pictures, PIL's, in RGB, and its videos as lists of such
    frames; a picture of several rows is decoded once."""
    if not images:
        return {}
    from rlflow.data.images import decode
    from rlflow.data.video_archive import frames_of, is_video

    distinct: dict[bytes, Any] = {
        data: [decode(frame) for frame in frames_of(data)] if is_video(data) else decode(data)
        for data in dict.fromkeys(data for of_row in images for data in of_row)
    }
    pictures = [[distinct[data] for data in of_row if not is_video(data)] for of_row in images]
    videos = [[distinct[data] for data in of_row if is_video(data)] for of_row in images]
    return {"images": pictures, "videos": videos}


def _no_list_of_scores(scores: Any, num_rows: int, is_changed: bool) -> str | None:
    """What else a function returned. What has no order, a set, cannot be told which row a score is of, and neither can
    the scores of a list that the function has sorted."""
    if scores is None:
        return "returned None, not a list of numbers"
    if isinstance(scores, str | bytes | Mapping) or not (hasattr(scores, "__len__") and hasattr(scores, "__getitem__")):
        return f"returned a {type(scores).__name__}, not a list of numbers"
    if is_changed:
        return "changed the list of completions it was given (work on a copy)"
    if len(scores) != num_rows:
        noun = "score" if len(scores) == 1 else "scores"
        return f"returned {len(scores)} {noun} for {num_rows} completions"
    return None


def _plain(score: Any) -> float | str | None:
    """Returns a number or None as it is, and of anything else what it is, in words."""
    if score is None:
        return None
    if isinstance(score, str | bytes | complex) or not hasattr(score, "__float__"):
        return f"a {type(score).__name__}"
    try:
        return float(score)
    except (OverflowError, TypeError, ValueError) as error:
        return f"a {type(score).__name__} that is no float ({error})"[:MAX_MESSAGE]


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE] + place


def _answer(connection: socket.socket, call_id: int, answer: Mapping[str, Any]) -> None:
    connection.sendall(frame(call_id, json.dumps(answer).encode()))


def die_with(parent_pid: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when the thread that started it ends; by SIGKILL it is killed
    whatever the functions do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent_pid:
        sys.exit("the process that started this one is gone")


if __name__ == "__main__":
    main(int(sys.argv[1]))
