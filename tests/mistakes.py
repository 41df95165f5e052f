"""How many mistakes do the tests notice? Makes single ones in copies of the code, and runs the tests on each.

    .venv/bin/python tests/mistakes.py                     # 140 of them, an hour on two cores
    .venv/bin/python tests/mistakes.py rlflow/driver -n 5  # five in one folder

A mistake is one small change of one line: a comparison, an operator, a number, a condition, a call left out. Which
ones are made follows from the code and the seed. First all tests without Ray run once on the code as it is, and it is
noted which of them come through the lines of the mistakes. Each mistake is then met by those, the cheapest files first;
then, for what runs in a process of its own is not seen, by the files that are nearest to its module, and by tests that
start Ray.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from queue import Queue
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("rlflow", "actors", "rewards", "tests", "recipes", "docs", "benchmarks", "cluster", "requirements"),
    *("pyproject.toml", "README.md", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md", ".gitignore", ".rayignore"),
)
FOLDERS = ("rlflow/driver", "rlflow/algorithms", "rlflow/data", "rlflow/recipe", "rlflow/tracking", "actors", "rewards")
WITHOUT_RAY, WITH_RAY = "not ray and not gpu", "ray and not gpu"
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
SAME: dict[str, str] = {
    "rewards/mathematics/values.py: if number.bit_length() > 3000: -> if number.bit_length() >= 3000:": "one bit less",
    "rlflow/data/encoding.py: return_attention_mask=False, -> return_attention_mask=True,": "nobody looks at it",
    "rlflow/driver/stopping.py: thread.join(_REINSTALL_S) -> pass": "it waits busily",
}
"""Mistakes that change nothing anyone could notice, as `path: line -> line`, and why."""


@dataclass(frozen=True, slots=True)
class Mistake:
    path: str
    line: int
    statement: int
    """Where the statement begins that the line is of."""
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
    tree = ast.parse(source)
    statements = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    found: dict[tuple[int, str], Mistake] = {}
    for node in _computing(tree):
        for start, end, text in _changes(node, source):
            row, first = start
            if row != end[0]:
                continue
            raw = lines[row - 1].encode()
            changed = (raw[:first] + text.encode() + raw[end[1] :]).decode()
            if changed != lines[row - 1] and not HARMLESS.search(changed):
                begins = max(line for line in statements if line <= row)
                found[row, changed] = Mistake(str(path.relative_to(ROOT)), row, begins, lines[row - 1], changed)
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
    """The first ``count`` mistakes of a folder, in an order that the seed gives."""
    every = [m for path in sorted((ROOT / folder).rglob("*.py")) for m in mistakes_in(path)]
    random.Random(f"{seed}/{folder}").shuffle(every)
    return [m for m in every if m.key not in SAME][:count]


def is_noticed(mistake: Mistake, tests: Mapping[str, float], copy: Path, quick: bool) -> bool:
    """Runs tests on a copy that has the mistake until one fails.

    Args:
        tests: Those that come through its line.
    """
    target = copy / mistake.path
    right = target.read_text(encoding="utf-8")
    lines = right.splitlines(keepends=True)
    lines[mistake.line - 1] = mistake.after + "\n"
    target.write_text("".join(lines), encoding="utf-8")
    near = nearest_tests(mistake.path)
    through = sorted({test.partition("::")[0] for test in tests})
    try:
        return (
            fails(copy, through, WITHOUT_RAY, Selection(tests))
            or fails(copy, near, WITHOUT_RAY)
            or (not quick and fails(copy, near, WITH_RAY))
        )
    finally:
        target.write_text(right, encoding="utf-8")


def fails(copy: Path, files: Sequence[str], markers: str, *plugins: Any) -> bool:
    """Whether one of the tests fails. A run that does not end is noticed, too."""
    if not files:
        return False
    process = PROCESSES.Process(target=run_tests, args=(copy, ["-x", *files, "-m", markers], plugins))
    process.start()
    process.join(TIMEOUT_S)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode not in (0, int(pytest.ExitCode.NO_TESTS_COLLECTED))


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "torch", "transformers.models.auto", "peft", "datasets"])
"""A run of tests has a process of its own, in which the libraries are loaded and rlflow is not."""


def run_tests(copy: Path, arguments: Sequence[str], plugins: Sequence[Any]) -> None:
    """Ends this process with pytest's exit code."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, copy))]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins)
    os._exit(int(code))


@dataclass(frozen=True, slots=True)
class Selection:
    """A pytest plugin: these tests alone, the files that take least first."""

    tests: Mapping[str, float]
    """Id -> seconds."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seconds: dict[Path, float] = defaultdict(float)
        items[:] = [item for item in items if item.nodeid in self.tests]
        for item in items:
            seconds[item.path] += self.tests[item.nodeid]
        items.sort(key=lambda item: (seconds[item.path], str(item.path)))


class LinesRun:
    """A pytest plugin: writes which tests pass and come through the lines of mistakes, a JSON object a line."""

    def __init__(self, copy: Path, mistakes: Sequence[Mistake], output: Path) -> None:
        self.copy, self.output = copy, output
        self.lines: dict[str, set[int]] = defaultdict(set)
        for mistake in mistakes:
            self.lines[mistake.path] |= {mistake.line, mistake.statement}
        self.paths: dict[CodeType, str | None] = {}
        """Of code in which a line is looked for."""
        self.seen: set[tuple[str, int]] = set()
        self.passed = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.seen, self.passed, started = set(), True, time.monotonic()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            if self.passed and self.seen:
                found = {"test": item.nodeid, "seconds": time.monotonic() - started, "lines": sorted(self.seen)}
                with self.output.open("a", encoding="utf-8") as file:
                    print(json.dumps(found), file=file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed = self.passed and not report.failed

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if code not in self.paths:
            path = code.co_filename.removeprefix(f"{self.copy}/").replace("rlflow/actors/", "actors/")
            path = path.replace("rlflow/rewards/", "rewards/")
            lines = self.lines.get(path, ())
            self.paths[code] = path if any(line in lines for _, _, line in code.co_lines()) else None
        return None if self.paths[code] is None else self.trace_line

    def trace_line(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        path = self.paths[frame.f_code]
        if path is not None and frame.f_lineno in self.lines[path]:
            self.seen.add((path, frame.f_lineno))
        return self.trace_line


def tests_through(mistakes: Sequence[Mistake], copies: Sequence[Path]) -> dict[tuple[str, int], dict[str, float]]:
    """(path, line) -> the tests without Ray that come through it. All are run once, on the code as it is."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    processes, outputs = [], []
    for number, copy in enumerate(copies):
        outputs.append(copy.with_suffix(".jsonl"))
        arguments = [*files[number :: len(copies)], "-m", WITHOUT_RAY]
        plugins = [LinesRun(copy, mistakes, outputs[-1])]
        processes.append(PROCESSES.Process(target=run_tests, args=(copy, arguments, plugins)))
        processes[-1].start()
    for process in processes:
        process.join(6 * TIMEOUT_S)
    found: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for said in (json.loads(line) for output in outputs if output.exists() for line in output.open(encoding="utf-8")):
        for path, line in said["lines"]:
            found[path, line][said["test"]] = said["seconds"]
    return found


def nearest_tests(path: str) -> list[str]:
    """Test files that import the module, those of its name first, and those of the folder that mirrors its own."""
    module = ".".join(Path(path).with_suffix("").parts)
    module = module if module.startswith("rlflow.") else f"rlflow.{module}"
    parent, _, name = module.rpartition(".")
    imports = re.compile(
        rf"from {re.escape(module)} import|import {re.escape(module)}\b|from {re.escape(parent)} import .*\b{name}\b"
    )
    found = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if imports.search(p.read_text(encoding="utf-8"))]
    found = sorted(found, key=lambda p: name not in p.stem)
    found += sorted({*(ROOT / "tests" / Path(path).parent).glob("test_*.py")} - {*found})
    return [str(p.relative_to(ROOT)) for p in found]


def make_copy(directory: Path) -> Path:
    """A tree to make mistakes in."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, directory / name)
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS, help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("-n", type=int, default=PER_FOLDER, help="mistakes in each folder")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--quick", action="store_true", help="leave the tests that start Ray out")
    given = parser.parse_args(arguments)
    of_folders = [[(folder, one) for one in chosen(folder, given.n, given.seed)] for folder in given.folders]
    # By turns, so that what was seen when somebody stops it is of all folders.
    made = [one for of_turn in zip_longest(*of_folders) for one in of_turn if one is not None]
    missed: list[tuple[str, Mistake]] = []
    workers = min(4, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        made_copies = [make_copy(Path(directory) / str(worker)) for worker in range(workers)]
        through = tests_through([mistake for _, mistake in made], made_copies)
        copies: Queue[Path] = Queue()
        for copy in made_copies:
            copies.put(copy)

        def examine(of: tuple[str, Mistake]) -> bool:
            mistake, copy = of[1], copies.get()
            tests = through.get((mistake.path, mistake.line)) or through.get((mistake.path, mistake.statement), {})
            try:
                return is_noticed(mistake, tests, copy, given.quick)
            finally:
                copies.put(copy)

        started = time.monotonic()
        for number, ((folder, mistake), noticed) in enumerate(zip(made, pool.map(examine, made), strict=True), 1):
            if not noticed:
                missed.append((folder, mistake))
                where = f"{mistake.path}:{mistake.line}"
                print(f"\nnot noticed: {where}\n  - {mistake.before}\n  + {mistake.after}", flush=True)
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
