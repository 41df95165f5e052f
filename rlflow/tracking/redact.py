"""Keeps secrets out of what is written: values by the name of their key, URL passwords, and well-known token shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_ALWAYS_SECRET = ("secret", "password", "passwd", "passphrase", "credential", "apikey")
_TOKENIZER_WORDS = frozenset(
    {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "image", "audio", "video", "special", "per", "last"}
)
"""What precedes ``token`` when it is a piece of text, not a credential."""
_AUTH_WORDS = frozenset({"auth", "access", "api", "bearer", "refresh"})

_URL_USERINFO = re.compile(r"(?<=://)[^/\s\"'<>]+@")
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z][\w-]*)(?P<between>["']?\s*[=:]\s*)(?P<value>"[^"]+"|'[^']+'|[^\s"',;&?=]{8,})"""
)
_KNOWN_SHAPES = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA|Bearer )[A-Za-z0-9_.-]{8,}")


def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a credential: ``api_key``, ``HF_TOKEN``; not ``token_ids`` or ``eos_token``."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    if any(part in "".join(words) for part in _ALWAYS_SECRET):
        return True
    if any(word.endswith(("key", "keys")) for word in words):
        return "value" not in words
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "tokens":
        return before in _AUTH_WORDS
    return words[-1].endswith("token") and before not in _TOKENIZER_WORDS


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
    """``text`` without URL userinfo, ``name=value`` of secret names, and tokens of well-known services."""
    text = _URL_USERINFO.sub(f"{MASK}@", text)
    text = _KNOWN_SHAPES.sub(rf"\g<1>{MASK}", text)
    return _ASSIGNMENT.sub(_mask_assignment, text)


def _mask_assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"]):
        return match[0]
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    return f"{match['name']}{match['between']}{quote}{MASK}{quote}"
