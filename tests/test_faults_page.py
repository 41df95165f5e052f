"""docs/faults.md names a test for every kind of fault."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"\b(tests/[\w/]+\.py)(?:::(?:\w+::)?(\w+))?")


@functools.cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what was")]
    assert len(rows) > 100
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for path, name in named:
            assert not name or name in functions_of(path), f"{path} has no {name}"
