"""How large a file and a function may be."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("rlflow", "actors", "rewards", "requirements", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 100

LOOPS = {"rlflow/driver/online.py": {"train_online"}, "rlflow/driver/offline.py": {"train_offline"}}
"""The driver's loops: each is an algorithm on one screen, and may be longer than another function."""
EXCEPTIONS: set[str] = set()
"""`path` or `path:function` of what may be larger, each with its reason."""


def python_files(*directories: str) -> list[Path]:
    return [path for directory in directories for path in sorted((ROOT / directory).rglob("*.py"))]


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*SOURCES, "tests")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES and name not in EXCEPTIONS} == {}


def test_no_function_is_too_long():
    too_long = {}
    for path in python_files(*SOURCES):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{name}:{node.name}" in EXCEPTIONS:
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > (MAX_LOOP_LINES if node.name in LOOPS.get(name, set()) else MAX_FUNCTION_LINES):
                too_long[f"{name}:{node.name}"] = lines
    assert too_long == {}
