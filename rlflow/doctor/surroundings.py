"""Ray, ports and hubs: what answers, and what is in the way."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rlflow.doctor.finding import Finding, fail, ok, warn
from rlflow.driver.errors import RunError
from rlflow.machine import named_cluster
from rlflow.ray_cluster import require_answer

PORTS = {
    6390: "`ray start --head`: --port",
    8275: "Ray's dashboard: --dashboard-port",
    8276: "Ray's client: --ray-client-server-port",
}
"""Port of the head in cluster/README.md -> who takes it, and the option that moves it."""
_HUB_S = 1.5
_CLUSTER_S = 1.5
_CURRENT = Path("/tmp/ray/ray_current_cluster")


def check_ray() -> Iterator[Finding]:
    address = named_cluster()
    if address is not None:
        try:
            require_answer(address, _CLUSTER_S)
        except RunError as error:
            problem, _, remedy = str(error).rpartition(": ")
            yield fail("Ray cluster", problem, remedy)
        else:
            yield ok("Ray cluster", f"{address} answers (RAY_ADDRESS)")
    elif _CURRENT.is_file():
        running = _CURRENT.read_text(encoding="utf-8").strip()
        yield ok("Ray cluster", f"one runs here at {running}; runs start their own unless RAY_ADDRESS names it")
    else:
        yield ok("Ray cluster", "none named by RAY_ADDRESS: runs start their own, on loopback, with a token")
    token = Path(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"))
    if token.is_file() and token.stat().st_mode & 0o077:
        yield warn("Ray token", f"{token} can be read by others", f"chmod 600 {token}")


def check_ports() -> Iterator[Finding]:
    taken = [port for port in PORTS if not _is_free(port)]
    if taken:
        moves = "; ".join(f"{port}, {PORTS[port]}" for port in taken)
        yield warn("ports", f"{', '.join(map(str, taken))} in use: runs are not in the way, a head node is", moves)
    else:
        yield ok("ports", f"{', '.join(map(str, PORTS))} are free for a head node")


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_hub() -> Iterator[Finding]:
    name, local = "Hugging Face hub", "models and data from directories work; HF_ENDPOINT names a mirror"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "off", "no"):
        yield warn(name, "HF_HUB_OFFLINE keeps it out of reach", f"unset it; {local}")
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"user-agent": "rlflow"})
        urllib.request.urlopen(request, timeout=_HUB_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        yield warn(name, f"{endpoint} is not reached: {reason}", local)
        return
    has_token = "HF_TOKEN" in os.environ or (hub_home() / "token").is_file()
    yield ok(
        name, f"{endpoint} answers; {'a token is set' if has_token else 'without a token: gated models are refused'}"
    )


def hub_home() -> Path:
    """Where huggingface_hub keeps a token."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")


CHECKS = (check_ray, check_ports, check_hub)
