"""Commands that messages print are typed as they stand: what is put into one is quoted as the shell wants it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rlflow.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
IN_A_COMMAND = re.compile(rf"(rlflow ({'|'.join(COMMANDS)})|wandb sync) [^`();:\n]*$")


def unquoted(source: str) -> Iterator[str]:
    """Values that a formatted string puts behind the beginning of a command, and nothing quotes."""
    for string in ast.walk(ast.parse(source)):
        if not isinstance(string, ast.JoinedStr):
            continue
        said = ""
        for part in string.values:
            if isinstance(part, ast.Constant):
                said += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                if IN_A_COMMAND.search(said) and not ast.unparse(part.value).startswith(("shlex.", "quote(")):
                    yield ast.unparse(part.value)
                said += "VALUE"


def test_what_is_put_into_a_command_is_quoted():
    assert list(unquoted('f"look: `rlflow logs {run}` and {other}; rlflow plan RECIPE; {third}"')) == ["run"]
    files = [path for folder in ("rlflow", "actors", "rewards") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): list(unquoted(path.read_text(encoding="utf-8"))) for path in files}
    assert len(found) > 300
    assert {path: values for path, values in found.items() if values} == {}
