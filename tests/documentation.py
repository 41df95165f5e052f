"""The pages of the documentation, as readers take them: commands, files that a page shows, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^( *)(```+)(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced or indented block."""

    line: int
    """Of its first line in the page, from 1."""
    info: str
    """What stands behind the opening fence; of an indented block nothing."""
    text: str

    @property
    def title(self) -> str | None:
        """The file that the block shows: ```` ```yaml title="recipe.yaml" ````."""
        found = _TITLE.search(self.info)
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class DocumentedCommand:
    """A command of `rlflow` or `make` that a page tells its reader to type."""

    page: str
    line: int
    program: str
    """``rlflow`` or ``make``."""
    words: tuple[str, ...]
    """Behind the program."""
    piped: str | None = None
    """What ``echo TEXT |`` before it gives it as standard input."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join([self.program, *self.words])}"


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        return list(_blocks(self.text.splitlines()))

    @cached_property
    def prose(self) -> str:
        """The page without its blocks and without code in its lines."""
        lines = self.text.splitlines()
        for block in self.blocks:
            for number in range(block.line - 1, block.line - 1 + len(block.text.splitlines())):
                lines[number] = ""
        return re.sub(r"`[^`\n]+`", "``", "\n".join(lines))

    @property
    def files(self) -> dict[str, str]:
        """Files that the page shows whole, by name."""
        return {block.title: block.text for block in self.blocks if block.title}

    @property
    def commands(self) -> list[DocumentedCommand]:
        return [
            DocumentedCommand(self.name, block.line + offset, *command)
            for block in self.blocks
            if block.title is None and not block.info.startswith("text")
            for offset, line in _joined(block.text)
            if (command := _command(line)) is not None
        ]

    @property
    def links(self) -> list[str]:
        return [found[1] or found[2] for found in LINK.finditer(self.prose)]

    @cached_property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub and the site make them."""
        found: set[str] = set()
        in_blocks = {block.line + i for block in self.blocks for i in range(len(block.text.splitlines()))}
        for number, line in enumerate(self.text.splitlines(), 1):
            heading = re.match(r"#{1,6} +(.*)", line)
            if heading and number not in in_blocks:
                name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
                anchor = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
                found.add(anchor if anchor not in found else f"{anchor}-1")
        return found


def pages() -> list[Page]:
    """What users read, but the log of changes."""
    return [
        Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "cluster/README.md")
    ]


def _blocks(lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening:
            end = number + 1
            while end < len(lines) and lines[end].strip() != opening[2]:
                end += 1
            text = "".join(f"{line.removeprefix(opening[1])}\n" for line in lines[number + 1 : end])
            yield Block(number + 2, opening[3].strip(), text)
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = lines[number:end]
            yield Block(
                number + 1,
                "",
                "".join(f"{line.strip() if line.startswith('       ') else line[4:]}\n" for line in body),
            )
            number = end
        else:
            number += 1


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """(place of its first line, line) with continuations joined."""
    pending, first = "", 0
    for offset, line in enumerate(text.splitlines()):
        first = first if pending else offset
        pending += line.strip() if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        yield first, pending
        pending = ""


def _command(line: str) -> tuple[str, tuple[str, ...], str | None] | None:
    """(program, its words, its standard input), where the line is a command of rlflow or of make."""
    if not re.search(r"(^|\s|/)(rlflow|make) ", line) or line.startswith("#"):
        return None
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    piped = None
    if words[:1] == ["echo"] and "|" in words:
        piped, words = words[1], words[words.index("|") + 1 :]
    elif words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or words[0] not in ("rlflow", ".venv/bin/rlflow", "make"):
        return None
    return words[0].rpartition("/")[2], tuple(words[1:]), piped
