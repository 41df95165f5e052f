"""Commands of cluster/README.md, to be run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "cluster" / "README.md"


def head_command(values: Mapping[str, Any] | None = None) -> list[str]:
    """The words that start the head, with other values of some of its options."""
    text = README.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ +RAY_AUTH_MODE=token (ray start --head .*)$", text, re.MULTILINE)
    words = shlex.split(line)
    for name, value in (values or {}).items():
        words[words.index(name) + 1] = str(value)
    return words
