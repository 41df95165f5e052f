"""How many mistakes do the tests notice? Makes single ones in copies of the code, and runs the tests on each.

    .venv/bin/python tests/mistakes.py                              # 140 of them, an hour or two on two cores
    .venv/bin/python tests/mistakes.py rlflow/driver -n 5           # the first five of one folder
    .venv/bin/python tests/mistakes.py rlflow/driver -n 5 --skip 5  # the next five

A mistake is one small change of one line: a comparison, an operator, a number, a condition, a call left out. Which
ones are made follows from the code and the seed. Each is met by the quick tests that import its module and those of the
folder that mirrors its own; when these notice nothing, by all quick tests whose imports lead to the module; and at last
by the slow ones of the first kind.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from queue import Queue

import pytest

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
SAME: dict[str, str] = {
    "rewards/mathematics/values.py: if number.bit_length() > 3000: -> if number.bit_length() >= 3000:": (
        "a root of so long a number is the same, exact or not"
    ),
    "rewards/statements.py: if not _is_formula(match) or len(formulas) >= 6000: -> "
    "if not _is_formula(match) or len(formulas) > 6000:": "one formula more of six thousand is hidden",
}
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


def chosen(folder: str, count: int, skip: int, seed: int) -> list[Mistake]:
    """``count`` mistakes of a folder after the first ``skip``, in an order that the seed gives."""
    every = [m for path in sorted((ROOT / folder).rglob("*.py")) for m in mistakes_in(path)]
    random.Random(f"{seed}/{folder}").shuffle(every)
    return [m for m in every if m.key not in SAME][skip : skip + count]


def is_noticed(mistake: Mistake, folder: str, copy: Path, quick: bool) -> bool:
    """Runs tests on a copy that has the mistake, nearest first, until one fails."""
    target = copy / mistake.path
    right = target.read_text(encoding="utf-8")
    lines = right.splitlines(keepends=True)
    lines[mistake.line - 1] = mistake.after + "\n"
    target.write_text("".join(lines), encoding="utf-8")
    near, far = tests_of(mistake.path, folder)
    try:
        return (
            fails(copy, near, "not ray and not slow and not gpu")
            or fails(copy, far, "not ray and not slow and not gpu")
            or (not quick and fails(copy, near, "(ray or slow) and not gpu"))
        )
    finally:
        target.write_text(right, encoding="utf-8")


def fails(copy: Path, files: Sequence[str], markers: str) -> bool:
    """Whether one of the tests fails. A run that does not end is noticed, too."""
    if not files:
        return False
    process = PROCESSES.Process(target=run_tests, args=(copy, [*files, "-m", markers]))
    process.start()
    process.join(TIMEOUT_S)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode not in (0, int(pytest.ExitCode.NO_TESTS_COLLECTED))


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "torch", "transformers.models.auto", "peft", "datasets"])
"""Each run of tests has a process of its own, in which the libraries are loaded already and rlflow is not."""


def run_tests(copy: Path, arguments: Sequence[str]) -> None:
    """Ends this process with pytest's exit code."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, copy))]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    os._exit(int(code))


def tests_of(path: str, folder: str) -> tuple[list[str], list[str]]:
    """Test files that import a module or are its folder's, and the others whose imports lead to it, nearest first."""
    distances = {_module(path): 0}
    importers = imported_by()
    queue = [_module(path)]
    for module in queue:
        for importer in sorted(importers.get(module, ())):
            if importer not in distances:
                distances[importer] = distances[module] + 1
                queue.append(importer)
    stem = Path(path).stem
    found = sorted(
        (distances[name], stem not in file.stem, str(file.relative_to(ROOT)))
        for file in (ROOT / "tests").rglob("test_*.py")
        if (name := _module(str(file.relative_to(ROOT)))) in distances
    )
    near = [file for distance, _, file in found if distance == 1]
    near += [
        str(file.relative_to(ROOT))
        for parent in TESTS[folder]
        for file in sorted((ROOT / parent).rglob("test_*.py"))
        if str(file.relative_to(ROOT)) not in near
    ]
    return near, [file for _, _, file in found if file not in near]


@functools.cache
def imported_by() -> dict[str, set[str]]:
    """Module -> those that import it anywhere in their code, or name it in a text, as the tables of functions do."""
    files = [p for top in ("rlflow", "actors", "rewards", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    modules = {_module(str(file.relative_to(ROOT))): file for file in files}
    importers: dict[str, set[str]] = {}
    for module, file in modules.items():
        for name in _named_modules(ast.parse(file.read_bytes())):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                importers.setdefault(name, set()).add(module)
    return importers


def _named_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{each.name}" for each in names)
            case ast.Constant(value=str(text)):
                yield from re.findall(r"rlflow(?:\.\w+)+", text)


def _module(path: str) -> str:
    """``actors/trainer.py`` is rlflow.actors.trainer, and a package's __init__ the package."""
    parts = Path(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] in ("rlflow", "tests", "benchmarks") else ("rlflow", *parts))


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
    parser.add_argument("--skip", type=int, default=0, help="how many of each folder were made before")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    given = parser.parse_args(arguments)
    of_folders = [
        [(folder, mistake) for mistake in chosen(folder, given.n, given.skip, given.seed)] for folder in given.folders
    ]
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
                return is_noticed(of[1], of[0], copy, given.quick)
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
