"""The dashboard of a cluster, which takes jobs: where it is, whether it lets us in, whether its Ray is new enough.

Ray's own client asks without a deadline, prefers RAY_ADDRESS to the address that it is given, and sends a token only
where RAY_AUTH_MODE says so.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from rlflow.driver.errors import RunError
from rlflow.ray_cluster import find_token

ANSWER_TIMEOUT_S = 5.0
_THIS_MACHINE = "http://127.0.0.1:8265"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
OLDEST_RAY = "2.52"
"""As in pyproject.toml: the first with token authentication."""
_OTHER_ADDRESS = (
    "start the head (cluster/README.md), bring its dashboard here with ssh -L, "
    f"or name it in --address or {_ADDRESS_VARIABLE}"
)


def dashboard_url(given: str | None) -> str:
    """What is given, what the environment names, or Ray's default port on this machine.

    Raises:
        RunError: It is no URL.
    """
    named = [given, os.environ.get(_ADDRESS_VARIABLE)]
    if "://" in os.environ.get("RAY_ADDRESS", ""):
        named.append(os.environ["RAY_ADDRESS"])
    url = next(filter(None, named), _THIS_MACHINE).rstrip("/")
    if not re.match(r"https?://[^/]+", url):
        raise RunError(
            f"{url} is not the URL of a dashboard: name that of the cluster's head, --address http://HOST:8265"
        )
    return url


def token_headers() -> dict[str, str]:
    """What goes with each request; empty without a token, or where RAY_AUTH_MODE turns tokens off."""
    token, _ = find_token()
    if not token or os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return {}
    return {"Authorization": f"Bearer {token}"}


def require_dashboard(url: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
    """Asks the dashboard for its version.

    Returns:
        What is worth a word: that its Ray is another than the one here; empty where it is the same.

    Raises:
        RunError: Nothing answers, what answers is no dashboard or refuses the token, or its Ray is too old.
    """
    request = urllib.request.Request(f"{url}/api/version", headers=token_headers())
    try:
        with urllib.request.build_opener().open(request, timeout=timeout_s) as response:
            there = str(json.loads(response.read())["ray_version"])
    except urllib.error.HTTPError as error:
        raise RunError(_refusal(url, error.code)) from error
    except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise RunError(f"what answers at {url} is no dashboard of a Ray cluster: {_remedy(url)}") from error
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        said = cause.strerror or cause if isinstance(cause, OSError) else cause
        reason = f"nothing within {timeout_s:g} s" if isinstance(cause, TimeoutError) else said
        raise RunError(f"no dashboard of a Ray cluster answers at {url} ({reason}): {_remedy(url)}") from error
    if _parts(there) < _parts(OLDEST_RAY):
        raise RunError(f"the cluster at {url} has Ray {there}, and rlflow needs {OLDEST_RAY} or newer: update it there")
    here = _installed_ray()
    if _parts(there)[:2] == _parts(here)[:2]:
        return ""
    return f"the cluster has Ray {there}, here is {here}: the job uses what is installed there"


def use_dashboard(url: str) -> None:
    """Has Ray's client talk to this one, whatever the environment names."""
    os.environ[_ADDRESS_VARIABLE] = url


def last_line(error: Exception) -> str:
    """What an answer of the dashboard comes down to: of a traceback, what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _refusal(url: str, status: int) -> str:
    token, source = find_token()
    as_it_has = "as the cluster has it (`ray get-auth-token` on its head prints it)"
    if status == 401 and token and not token_headers():
        return f"the cluster at {url} asks for a token, and RAY_AUTH_MODE is disabled here: unset it"
    if status == 401 and not token:
        return f"the cluster at {url} asks for a token, and there is none here: set RAY_AUTH_TOKEN {as_it_has}"
    if status in (401, 403) and not _has_proxy(url):
        return f"the cluster at {url} refuses the token of {source}: set RAY_AUTH_TOKEN {as_it_has}"
    return f"what answers at {url} is no dashboard of a Ray cluster (HTTP {status}): {_remedy(url)}"


def _remedy(url: str) -> str:
    if _has_proxy(url):
        return f"a proxy is asked, of the environment: export NO_PROXY={urlsplit(url).hostname}"
    return _OTHER_ADDRESS


def _has_proxy(url: str) -> bool:
    parts = urlsplit(url)
    is_named = parts.scheme in urllib.request.getproxies()
    return is_named and not urllib.request.proxy_bypass(parts.hostname or "")


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _installed_ray() -> str:
    try:
        return version("ray")
    except PackageNotFoundError:
        raise RunError("Ray is not installed here: pip install 'ray[default]'") from None
