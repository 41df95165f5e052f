"""Keeps secrets out of what is written.

A secret is known by the name of its key (in a recipe, an assignment, a URL's query, the environment), as a URL's user
and password, by the shape of a well-known service's tokens, or because its value was met under such a name before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 6
"""Characters of a value that is replaced wherever it turns up: shorter ones would be words of every sentence."""
LONG_LINE = 16
"""Characters of a line of a longer secret, a private key say, that is replaced where it stands alone."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_ALWAYS_SECRET = ("secret", "password", "passwd", "passphrase", "credential", "apikey", "authorization", "cookie")
_WHOLLY_SECRET = frozenset({"auth", "header", "headers"})
"""Names whose last word is one of these hold secrets under names of any kind."""
_TOKENIZER_WORDS = frozenset(
    {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "image", "audio", "video", "special", "per", "last"}
)
"""What precedes ``token`` when it is a piece of text, not a credential."""
_COLUMN_WORDS = frozenset(
    {"prompt", "answer", "solution", "response", "question", "column", "data", "label", "image", "messages", "sort"}
)
"""What precedes ``key`` when it names a column."""
_AUTH_WORDS = frozenset({"auth", "access", "api", "bearer", "refresh"})
_DIRECTORIES = frozenset({"PWD", "OLDPWD"})

_URL_USERINFO = re.compile(r"(?<=://)[^/\s\"'<>]+@")
_URL_PASSWORD = re.compile(r"://[^/\s\"'<>:@]*:?([^/\s\"'<>]+)@")
_QUERY = re.compile(r"(?P<before>[?&;])(?P<name>[\w.~-]+)=(?P<value>[^&;\s\"'<>#]+)")
_QUERY_NAMES = frozenset({"sig", "signature", "jwt", "code", "pwd", "pass", "sid", "session"})
_AUTHORIZATION = re.compile(
    r"""(?P<before>authorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic|token)\s+)?)[^\s"',;}]+""", re.IGNORECASE
)
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z][\w-]*)(?P<between>["']?\s*[=:]\s*)(?P<value>"[^"]+"|'[^']+'|[^\s"',;&?=]{8,})"""
)
_KNOWN_SHAPES = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-|A[KS]IA|AIza|gsk_|npm_|pypi-|eyJ|Bearer )[A-Za-z0-9_.-]{8,}"
)

_met: set[str] = set()


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a credential: ``api_key``, ``HF_TOKEN``; not ``token_ids`` or ``eos_token``."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or name in _DIRECTORIES:
        return False
    before, last = words[-2] if len(words) > 1 else "", words[-1]
    if any(part in "".join(words) for part in _ALWAYS_SECRET) or last in _WHOLLY_SECRET:
        return True
    if before and last in ("pwd", "pass"):
        return True
    if any(word.endswith(("key", "keys")) for word in words):
        return not {"value", "error"} & set(words) and before not in _COLUMN_WORDS
    if last == "tokens":
        return before in _AUTH_WORDS
    return last.endswith("token") and before not in _TOKENIZER_WORDS


def redact(value: Any, *, secret: bool = False) -> Any:
    """A copy of JSON-like data with secrets replaced.

    Args:
        value: Mappings, lists and scalars.
        secret: Whether ``value`` belongs to a key that holds a secret: every string and number in it is replaced.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, secret=secret or is_secret_name(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, secret=secret) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if secret:
        return MASK
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """``text`` without URL userinfo, values of secret names, tokens of well-known services, and secrets met before."""
    spellings = {spelling for value in _met | _of_environment() for spelling in _spellings(value)}
    for value in sorted(spellings, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _URL_USERINFO.sub(f"{MASK}@", text)
    text = _QUERY.sub(_mask_query, text)
    text = _AUTHORIZATION.sub(rf"\g<before>{MASK}", text)
    text = _KNOWN_SHAPES.sub(rf"\g<1>{MASK}", text)
    return _ASSIGNMENT.sub(_mask_assignment, text)


def holds_secret(text: str) -> bool:
    """Whether a URL in ``text`` has a password, or a token in its query."""
    return next(_secrets_in(text, secret=False), None) is not None


def remember_secrets(data: Any) -> None:
    """Has `redact_text` replace the secrets of JSON-like data from now on, wherever in this process they turn up."""
    _met.update(secrets_in(data))


def secrets_in(data: Any) -> list[str]:
    """The secrets of JSON-like data, as they are written there."""
    return sorted(set(_long_enough(_secrets_in(data, secret=False))))


def redact_tracebacks() -> None:
    """Lets exceptions that end this process print their traceback without secrets."""
    sys.excepthook = _print_exception


def _print_exception(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    print(redact_text("".join(traceback.format_exception(kind, error, frames))), end="", file=sys.stderr)


def _of_environment() -> set[str]:
    """Values of variables with secret names, and passwords in the others' URLs, as the environment is now."""
    values = _long_enough(_secrets_in(dict(os.environ), secret=False))
    return {value for value in values if not (value.startswith("/") and os.path.exists(value))}


def _secrets_in(data: Any, *, secret: bool) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, item in data.items():
            yield from _secrets_in(item, secret=secret or is_secret_name(str(key)))
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _secrets_in(item, secret=secret)
    elif secret and isinstance(data, (str, int, float)) and not isinstance(data, bool):
        yield str(data)
        # What follows `Bearer` in a header may be quoted without it.
        yield str(data).rpartition(" ")[2]
    elif isinstance(data, str) and "://" in data:
        yield from _URL_PASSWORD.findall(data)
        yield from (match["value"] for match in _QUERY.finditer(data) if _is_secret_query(match["name"]))


def _long_enough(values: Iterable[str]) -> Iterator[str]:
    return (value for value in values if len(value) >= SHORTEST)


@lru_cache(maxsize=4096)
def _spellings(value: str) -> frozenset[str]:
    """How a secret turns up: as it is, in Python's and JSON's escapes, in a URL, and line by line."""
    lines = [line for line in value.splitlines() if len(line) >= LONG_LINE]
    return frozenset((value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe=""), *lines))


def _is_secret_query(name: str) -> bool:
    return name.lower() in _QUERY_NAMES or is_secret_name(name) or name.lower().endswith(("-signature", "_signature"))


def _mask_query(match: re.Match[str]) -> str:
    return f"{match['before']}{match['name']}={MASK}" if _is_secret_query(match["name"]) else match[0]


def _mask_assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]):
        return match[0]
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    return f"{match['name']}{match['between']}{quote}{MASK}{quote}"
