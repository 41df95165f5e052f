"""The recipes that can be started from the page: listed, read, checked as `rlflow plan` checks them, and kept."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlflow.recipe import RecipeError, load_recipe
from rlflow.recipe.yaml_source import MAX_BYTES
from rlflow.ui.refusal import Refusal

CHECK_SECONDS = 120.0
"""How long `rlflow plan` may take: it reads the data."""
MAX_FILES = 500
MAX_OVERRIDES = 100
_SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,100}\.ya?ml")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.+-]*=.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `rlflow plan` says of a recipe."""

    is_right: bool
    plan: str
    """What will run where."""
    problems: tuple[tuple[int | None, str], ...]
    """(line of the recipe's own file or None, what is wrong and what to do)."""


class Recipes:
    """The YAML files in some directories.

    Args:
        directories: Where they are looked for, below too; those that are missing are left out.
        here: The directory from which runs are started, and below which names are shown short.
        packaged: The recipes that come with rlflow, which stay as they are.
    """

    def __init__(self, directories: Sequence[Path], here: Path, packaged: Sequence[Path] = ()) -> None:
        self._directories, self._here = directories, here
        self._packaged = [path.resolve() for path in packaged]

    def own(self) -> dict[str, Path]:
        """The user's recipes by the name that is shown: relative to where runs are started, or absolute."""
        found: dict[str, Path] = {}
        for directory in self._directories:
            root = directory.resolve()
            for path in sorted(root.rglob("*")) if root.is_dir() else ():
                hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
                inside = path.resolve().is_relative_to(root)
                if path.suffix in _SUFFIXES and not hidden and inside and path.is_file():
                    found.setdefault(self._shown(path), path)
                if len(found) >= MAX_FILES:
                    break
        return found

    def packaged(self) -> dict[str, Path]:
        """Those that come with rlflow and are not among the user's."""
        own = {path.resolve() for path in self.own().values()}
        return {self._shown(path): path for path in self._packaged if path not in own}

    def path(self, name: str) -> Path:
        """Raises Refusal: no recipe of that name is listed."""
        files = self.own() | self.packaged()
        if name not in files:
            raise Refusal(404, f"there is no recipe {name[:200]} among those that are listed")
        return files[name]

    def text(self, name: str) -> str:
        """Raises Refusal: it cannot be read as text."""
        path = self.path(name)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise Refusal(413, f"{name} is larger than {MAX_BYTES >> 20} MiB, which no recipe is")
            return path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise Refusal(422, f"{name} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Refusal(422, f"{name} is not UTF-8 text (byte {error.start})") from error

    async def check(self, name: str, text: str, overrides: Sequence[str], *, data: bool) -> Verdict:
        """What `rlflow plan` says of ``text`` where it stood in place of a recipe's own.

        Args:
            data: Whether the data is read too.
        """
        path = self.path(name)
        if text == self.text(name):
            return await run_plan(path, overrides, data=data)
        self._require_own(path)
        with beside(path, text) as copy:
            verdict = await run_plan(copy, overrides, data=data)
        shown = [(line, problem.replace(copy.stem, path.stem)) for line, problem in verdict.problems]
        return Verdict(verdict.is_right, verdict.plan.replace(copy.stem, path.stem), tuple(shown))

    def keep(self, name: str, text: str, new_name: str) -> str:
        """Writes an edited recipe beside the one it came from, where its relative paths mean the same.

        Returns:
            What the new one is called.

        Raises:
            Refusal: There is a file of that name already, or it cannot be written.
        """
        if not _NAME.fullmatch(new_name):
            raise Refusal(422, f"{new_name[:100]!r} is no name for a recipe: letters, digits, - and _, then .yaml")
        before = self.path(name)
        self._require_own(before)
        path = before.with_name(new_name)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise Refusal(409, f"there is a {new_name} already: choose another name") from None
        except OSError as error:
            raise Refusal(422, f"{path.parent} cannot be written in ({error.strerror}): copy the recipe") from error
        return self._shown(path)

    def _require_own(self, path: Path) -> None:
        """Raises Refusal: it came with rlflow, and is found in no directory of the user's."""
        if path in self.packaged().values():
            copy = self._here / "recipes" / path.name
            command = f"mkdir -p {shlex.quote(str(copy.parent))} && rlflow recipes {shlex.quote(path.stem)}"
            remedy = f"`{command} > {shlex.quote(str(copy))}`, and edit that"
            raise Refusal(422, f"what comes with rlflow stays as it is: {remedy}")

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self._here)) if path.is_relative_to(self._here) else str(path)


def checked_overrides(given: object) -> list[str]:
    """``key=value`` each: nothing that `rlflow run` could take for an option. Raises Refusal."""
    if not isinstance(given, list) or len(given) > MAX_OVERRIDES:
        raise Refusal(422, f"overrides are a list of at most {MAX_OVERRIDES} key=value")
    for text in given:
        if not isinstance(text, str) or not _OVERRIDE.fullmatch(text) or "\0" in text or len(text) > 10_000:
            raise Refusal(422, f"{str(text)[:100]} is no override: write key=value, e.g. run.steps=10")
    return given


def output_directories(path: Path, overrides: Sequence[str]) -> list[Path]:
    """Where each stage of a recipe writes. Raises Refusal: the recipe is wrong."""
    try:
        return [Path(recipe.run.output_dir) for recipe in load_recipe(path, overrides)]
    except RecipeError as error:
        raise Refusal(422, str(error)) from error


async def run_plan(path: Path, overrides: Sequence[str], *, data: bool) -> Verdict:
    """Calls `rlflow plan`: what a recipe names, plugins among it, is never loaded into this process.

    Raises:
        Refusal: It did not end in time.
    """
    command = [sys.executable, "-m", "rlflow", "plan", str(path), *overrides, "--tokenize" if data else "--no-data"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), CHECK_SECONDS)
    except TimeoutError:
        hint = "" if not data else ": its data may be large or far away; start it without reading the data first"
        raise Refusal(504, f"`rlflow plan` took longer than {CHECK_SECONDS:.0f} s{hint}") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, 9)
            await process.wait()
    problems = [] if process.returncode == 0 else _problems(errors.decode(errors="replace"), path)
    return Verdict(process.returncode == 0, output.decode(errors="replace"), tuple(problems))


def _problems(errors: str, path: Path) -> Iterator[tuple[int | None, str]]:
    """Lines of a RecipeError: ``file:12: key: what is wrong``; what is not of this file keeps its name."""
    of_line = re.compile(rf"{re.escape(str(path))}:(\d+): (.*)")
    of_file = f"{path}: "
    for text in errors.strip().splitlines() or ["`rlflow plan` failed and did not say why"]:
        if match := of_line.fullmatch(text):
            yield int(match[1]), match[2]
        else:
            yield None, text.removeprefix(of_file)


@contextmanager
def beside(path: Path, text: str) -> Iterator[Path]:
    """A hidden copy beside a recipe, for as long as it is looked at.

    Raises:
        Refusal: Nothing can be written there.
    """
    copy = path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")
    try:
        with copy.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise Refusal(
            422,
            f"{path.parent} cannot be written in ({error.strerror}), so an edited recipe cannot be checked",
        ) from error
    try:
        yield copy
    finally:
        copy.unlink(missing_ok=True)
