"""How many mistakes do the tests notice? Makes single ones in copies of the code, and runs the tests on each.

    .venv/bin/python tests/mistakes.py                     # all of them, some 30 minutes on two cores
    .venv/bin/python tests/mistakes.py rlflow/driver -n 5  # five in one folder

A mistake is one small change of one line: a comparison, an operator, a number, a condition, a call left out. Which
ones are made follows from the code and the seed. Each is met by the quick tests that import its module and those of the
folder that mirrors its own, and when these notice nothing by the slow ones.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rlflow", "actors", "rewards", "tests", "recipes", "docs", "benchmarks", "cluster", "requirements")
TESTS: dict[str, tuple[str, ...]] = {
    "rlflow/driver": ("tests/rlflow/driver",),
    "rlflow/algorithms": ("tests/rlflow/algorithms",),
    "rlflow/data": ("tests/rlflow/data",),
    "rlflow/recipe": ("tests/rlflow/recipe",),
    "rlflow/tracking": ("tests/rlflow/tracking",),
    "actors": ("tests/actors",),
    "rewards": ("tests/rewards",),
}
"""Folder -> where its tests are, beside those that import the module."""
PER_FOLDER = 20
TIMEOUT_S = 600
SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
}
"""What stands there, and what is written instead."""
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
HARMLESS = re.compile(r"timeout|deadline|indent=|\[:\d+\]")
"""In lines with these a number says how long something may take, or how much of it is shown."""
SAME: dict[str, str] = {}
"""Mistakes that change nothing anyone could notice, as `path: line -> line`, and why."""


@dataclass(frozen=True, slots=True)
class Mistake:
    path: str
    line: int
    before: str
    after: str
    """The whole lines."""

    @property
    def key(self) -> str:
        return f"{self.path}: {self.before.strip()} -> {self.after.strip()}"


def mistakes_in(path: Path) -> list[Mistake]:
    """Every mistake that can be made in a file."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[tuple[int, str], Mistake] = {}
    for node in _computing(ast.parse(source)):
        for start, end, text in _changes(node, source):
            row, first = start
            if row != end[0]:
                continue
            raw = lines[row - 1].encode()
            changed = (raw[:first] + text.encode() + raw[end[1] :]).decode()
            if changed != lines[row - 1] and not HARMLESS.search(changed):
                found[row, changed] = Mistake(str(path.relative_to(ROOT)), row, lines[row - 1], changed)
    return list(found.values())


def _computing(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of what is computed in functions: no annotations, no defaults, no messages, no assertions."""

    def walk(node: ast.AST, within: bool) -> Iterator[ast.AST]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            return
        if within:
            yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in node.body:
                yield from walk(child, True)
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, within)

    return walk(tree, False)


Place = tuple[int, int]
"""Line from 1, byte in it from 0."""


def _changes(node: ast.AST, source: str) -> Iterator[tuple[Place, Place, str]]:
    """From where to where, and what stands there instead."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SWAPS:
            yield from _swapped(source, left, op, right)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPS:
            yield from _swapped(source, left, op, right)
        case ast.BoolOp(op=op, values=[left, right, *_]):
            yield from _swapped(source, left, op, right)
        case ast.UnaryOp(op=ast.Not(), lineno=line, col_offset=column):
            yield (line, column), (line, column + len("not ")), ""
        case ast.Constant(value=bool(value)):
            yield _start(node), _end(node), str(not value)
        case ast.Constant(value=int(value)):
            yield _start(node), _end(node), str(value + 1)
        case ast.Constant(value=float(value)):
            yield _start(node), _end(node), repr(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name) as function) if name in NAMES:
            yield _start(function), _end(function), NAMES[name]
        case ast.Expr(value=ast.Call()):
            yield _start(node), _end(node), "pass"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield _start(test), _end(test), f"(not ({ast.get_source_segment(source, test)}))"


def _swapped(source: str, left: ast.expr, op: ast.AST, right: ast.expr) -> Iterator[tuple[Place, Place, str]]:
    """Another operator between two operands of one line."""
    if left.end_lineno == right.lineno:
        line = source.splitlines()[right.lineno - 1].encode()
        between = line[left.end_col_offset : right.col_offset].decode()
        yield _end(left), _start(right), between.replace(*SWAPS[type(op)], 1)


def _start(node: ast.expr | ast.stmt) -> Place:
    return node.lineno, node.col_offset


def _end(node: ast.expr | ast.stmt) -> Place:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset


def chosen(folder: str, count: int, seed: int) -> list[Mistake]:
    """``count`` mistakes of a folder, files and lines of them drawn with the seed."""
    every = [m for path in sorted((ROOT / folder).rglob("*.py")) for m in mistakes_in(path)]
    return random.Random(f"{seed}/{folder}").sample([m for m in every if m.key not in SAME], min(count, len(every)))


def is_noticed(mistake: Mistake, folder: str, copy: Path, quick: bool) -> bool:
    """Runs the folder's tests on a copy that has the mistake. A run that does not end is noticed, too."""
    target = copy / mistake.path
    right = (ROOT / mistake.path).read_text(encoding="utf-8")
    lines = right.splitlines(keepends=True)
    lines[mistake.line - 1] = mistake.after + "\n"
    target.write_text("".join(lines), encoding="utf-8")
    kind = "not ray and not slow and not gpu" if quick else "(ray or slow) and not gpu"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", kind]
    command += [*nearest_tests(mistake.path), *TESTS[folder]]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        code = 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        target.write_text(right, encoding="utf-8")
    return code not in (0, 5)


def nearest_tests(path: str) -> list[str]:
    """Test files that import the module, those of its name first: most mistakes end there."""
    module = ".".join(Path(path).with_suffix("").parts)
    module = module if module.startswith("rlflow.") else f"rlflow.{module}"
    parent, _, name = module.rpartition(".")
    imports = re.compile(
        rf"from {re.escape(module)} import|import {re.escape(module)}\b|from {re.escape(parent)} import .*\b{name}\b"
    )
    found = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if imports.search(p.read_text(encoding="utf-8"))]
    return [str(p.relative_to(ROOT)) for p in sorted(found, key=lambda p: name not in p.stem)]


def make_copy(directory: Path) -> Path:
    """A tree to make mistakes in."""
    for name in COPIED:
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "pyproject.toml",
        "README.md",
        "Makefile",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        ".gitignore",
        ".rayignore",
    ):
        shutil.copy(ROOT / name, directory / name)
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("-n", type=int, default=PER_FOLDER, help="mistakes in each folder")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    given = parser.parse_args(arguments)
    of_folders = [[(folder, mistake) for mistake in chosen(folder, given.n, given.seed)] for folder in given.folders]
    # By turns, so that what was seen when somebody stops it is of all folders.
    made = [one for of_turn in zip_longest(*of_folders) for one in of_turn if one is not None]
    started, missed = time.monotonic(), []
    workers = min(4, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        copies: Queue[Path] = Queue()
        for worker in range(workers):
            copies.put(make_copy(Path(directory) / str(worker)))

        def examine(of: tuple[str, Mistake]) -> bool:
            copy = copies.get()
            try:
                noticed = is_noticed(of[1], of[0], copy, True)
                return noticed or (not given.quick and is_noticed(of[1], of[0], copy, False))
            finally:
                copies.put(copy)

        for number, ((folder, mistake), noticed) in enumerate(zip(made, pool.map(examine, made), strict=True), 1):
            if not noticed:
                missed.append((folder, mistake))
                print(
                    f"\nnot noticed: {mistake.path}:{mistake.line}\n  - {mistake.before}\n  + {mistake.after}",
                    flush=True,
                )
            left = (time.monotonic() - started) / number * (len(made) - number)
            print(f"\r{number} of {len(made)}, {len(missed)} not noticed, {left:.0f} s left ", end="", flush=True)
    print("\n\n| folder | mistakes | noticed |\n|---|---|---|")
    for folder in given.folders:
        total, lost = sum(f == folder for f, _ in made), sum(f == folder for f, _ in missed)
        print(f"| {folder} | {total} | {total - lost} |")
    print(f"| all | {len(made)} | {len(made) - len(missed)} |")
    return int(len(missed) > 0.1 * len(made))


if __name__ == "__main__":
    sys.exit(main())
