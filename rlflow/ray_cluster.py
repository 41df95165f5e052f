"""The Ray cluster that a run joins, or the one that it starts for itself: who may reach it, and whether it answers."""

from __future__ import annotations

import inspect
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rlflow.driver.errors import RunError
from rlflow.tracking.log_process import Log
from rlflow.tracking.redact import redact_text

ANSWER_TIMEOUT_S = 3.0
"""A cluster that is silent for longer is gone. Ray itself goes on asking for minutes."""
_REMEDY = "start the cluster, correct RAY_ADDRESS, or unset it to run on this machine"
_PRESTART_SWITCH = "RAY_prestart_worker_first_driver"
_TOKEN_FILE = "~/.ray/auth_token"
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several machines, after the systems where it is off: without it all of Ray's processes,
the metrics exporter included, listen on 127.0.0.1 alone."""


def require_answer(address: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Asks whether a Ray head is there. ``auto`` is looked up by Ray, at once.

    Raises:
        RunError: Nothing answers, what answers is no Ray head, or it wants another token.
    """
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise RunError(f"RAY_ADDRESS is {address}, which is not HOST:PORT, ray://HOST:PORT or auto: {_REMEDY}")
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise RunError(f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({reason}): {_REMEDY}") from error
    if os.environ.get("RAY_USE_TLS", "0") == "0" and (problem := _problem_of_head(f"{host}:{port}", timeout_s)):
        raise RunError(f"RAY_ADDRESS is {address}, and {problem}")


def _problem_of_head(target: str, timeout_s: float) -> str | None:
    """Why what listens there cannot be joined, and what to do; None where it can, as far as can be told."""
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return f"what answers there is no Ray head, or one that hangs: {_REMEDY}"
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", metadata=(("authorization", f"Bearer {find_token()[0]}"),), timeout=timeout_s)
        except grpc.RpcError as error:
            # Anything else, such as a port of Ray's client, says nothing of whether it can be joined.
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return "that cluster wants another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as it has them"
    return None


def why_not(error: Exception) -> str:
    """What Ray says against joining a cluster, in one line, and what to do where that is known."""
    said = " ".join(str(error).split())
    if said.startswith("Version mismatch"):
        return f"{said}; install the same Ray and Python on all machines, or have it run there: rlflow submit"
    return said


def find_token() -> tuple[str, str]:
    """The user's own, where Ray looks for it, and the name of that place; empty where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN"
    path = Path(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or _TOKEN_FILE))
    return (path.read_text(encoding="utf-8").strip(), str(path)) if path.is_file() else ("", "")


def ask_for_a_token() -> None:
    """Has a Ray that is started from here ask everybody for a token; a user's own settings stay as they are.

    The token lives in the environment of Ray's processes alone: a new one each run, in no file.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not find_token()[0]:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")  # this process has read its environment already


@contextmanager
def few_services() -> Iterator[None]:
    """Within it, a Ray that is started has no autoscaler, no log monitor and no workers that wait for tasks.

    A run on one machine uses none of them, and each is a Python process of about half a second of CPU time. Ray has
    switches for them, which `ray.init` does not pass on; a version that has others starts what it starts by itself.
    """
    from ray._private import parameter

    ray_params, left_out = parameter.RayParams, {"no_monitor": True, "include_log_monitor": False}
    if not left_out.keys() <= inspect.signature(ray_params).parameters.keys():
        yield
        return
    is_chosen = _PRESTART_SWITCH in os.environ
    os.environ.setdefault(_PRESTART_SWITCH, "0")
    parameter.RayParams = partial(ray_params, **left_out)
    try:
        yield
    finally:
        parameter.RayParams = ray_params
        if not is_chosen:
            del os.environ[_PRESTART_SWITCH]


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within it, a Ray that is started listens on this machine's loopback address alone, unless the user says else."""
    from ray._private import ray_constants

    if _LOOPBACK_SWITCH in os.environ:
        yield
        return
    # Ray reads the variable when it is imported; its processes read it when they start.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[_LOOPBACK_SWITCH] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[_LOOPBACK_SWITCH]


@contextmanager
def warnings_kept(path: Path) -> Iterator[None]:
    """Within it, what Ray tells the driver (a worker that died, a node that is short of memory) goes to a file.

    It prints them on the terminal, whatever ``log_to_driver`` says; a version that does so in another way goes on.
    """
    from ray._private import worker

    if not hasattr(worker, "print_to_stdstream"):
        yield
        return

    def keep(data: dict[str, Any], *_: Any, **__: Any) -> None:
        Log(path, redact_text).write("\n".join([time.strftime("%Y-%m-%d %H:%M:%S"), *data["lines"]]).encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    printed, worker.print_to_stdstream = worker.print_to_stdstream, keep
    try:
        yield
    finally:
        worker.print_to_stdstream = printed
