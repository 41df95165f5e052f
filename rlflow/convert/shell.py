"""A shell script as the commands that it runs: words and variables, read without running anything.

What is understood is what launch scripts are made of: assignments, exports, quotes, line continuations, arrays,
``$X``, ``${X:-default}``, ``$(expr 16 / $n)``, ``$((2 * n))``, several commands, redirections. Of ``if`` and loops the
commands within are read once. A variable that the script does not set stays as it is written.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_VARIABLE = re.compile(r"\$(\w+|[@*#?$!])")
_BRACED = re.compile(r"(\w+)(?:\[[@*]\])?(?:(:?[-=+])(.*))?", re.DOTALL)
_OPTION = re.compile(r"--?[A-Za-z]")
_KEYWORDS = {"if", "then", "else", "elif", "fi", "do", "done", "while", "until", "{", "}", "!", "export", "declare"}
_CONTINUATIONS = ("\\\n", "\\ ", "\\\t", "^\n", "`\n")
"""Of a shell, of one whose lines were put on one, of Windows' two shells."""
_ENDS = "\n;&|()"
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """One command of a script."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables of the script so far, and those before the command's first word."""
    line: int
    """From 1."""
    broken: tuple[int, ...] = ()
    """Lines that begin with an option, and that no backslash joins to it."""
    unset: frozenset[str] = frozenset()
    """What of the script so far stays as it is written, because nothing says what it stands for: variables, output of
    programs. A dollar in single quotes or behind a backslash is none of it."""


def read_commands(script: str) -> Iterator[ShellCommand]:
    """The commands of a script, in order; a line that begins with an option belongs to the command before it."""
    before: ShellCommand | None = None
    for command in _commands(script):
        if before is not None and _OPTION.match(command.words[0]):
            words, lines = before.words + command.words, (*before.broken, command.line)
            before = replace(before, words=words, broken=lines, unset=before.unset | command.unset)
            continue
        if before is not None:
            yield before
        before = command
    if before is not None:
        yield before


def _commands(script: str) -> Iterator[ShellCommand]:
    """The commands as a shell would run them."""
    reader = _Reader(script.replace("\r\n", "\n"))
    while reader.at < len(reader.text):
        line = reader.line
        words = [word for word in reader.words() if word is not None]
        if words and words[0] in ("for", "case", "function"):
            continue
        while words and words[0] in _KEYWORDS:
            words = words[1:]
        own: dict[str, str] = {}
        while words and (named := _ASSIGNMENT.match(words[0])):
            before = reader.variables.get(named[1], "") if named[2] else ""
            own[named[1]] = before + words[0][named.end() :]
            words = words[1:]
        if words:
            yield ShellCommand(tuple(words), {**reader.variables, **own}, line, unset=frozenset(reader.unset))
        else:
            reader.variables |= own


class _Reader:
    """Reads words from where it stands, and remembers what is assigned."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.variables: dict[str, str] = {}
        self.unset: set[str] = set()

    @property
    def line(self) -> int:
        skipped = len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        return self.text.count("\n", 0, self.at + skipped) + 1

    def words(self) -> Iterator[str]:
        """The words up to the end of the command."""
        while self.at < len(self.text):
            character = self.text[self.at]
            if self.text.startswith(_CONTINUATIONS, self.at):
                self.at += 2
            elif character in " \t":
                self.at += 1
            elif character == "#":
                self._skip_line()
            elif (redirection := re.compile(r"\d*(>>?&?|<<?-?)\s*").match(self.text, self.at)) is not None:
                self.at = redirection.end()
                list(self._word())
            elif character in _ENDS:
                self.at += 1
                return
            else:
                yield from self._word()

    def _skip_line(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _word(self) -> Iterator[str]:
        """The word here; several or none where an unquoted variable holds so many."""
        array = re.compile(r"\"\$\{(\w+)\[@\]\}\"").match(self.text, self.at)
        if array is not None and array[1] in self.variables:
            self.at = array.end()
            yield from _split(self.variables[array[1]])
            return
        word, is_quoted = "", False
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in " \t" or character in _ENDS:
                if character == "(" and _ASSIGNMENT.fullmatch(word):
                    self.at += 1
                    word += " ".join(shlex.quote(item) for item in self.words_of_array())
                    continue
                break
            if character == "'":
                end = self.text.find("'", self.at + 1)
                end = len(self.text) if end < 0 else end
                word, is_quoted, self.at = word + self.text[self.at + 1 : end], True, end + 1
            elif character == '"':
                word, is_quoted = word + self._double_quoted(), True
            elif character == "\\":
                word += self.text[self.at + 1 : self.at + 2].replace("\n", "")
                self.at += 2
            elif character == "$":
                value = self._expansion()
                if word or is_quoted or not re.search(r"\s", value) or "$(" in value:
                    word += value
                else:
                    yield from _split(value)
            else:
                word, self.at = word + character, self.at + 1
        if word or is_quoted:
            yield word

    def words_of_array(self) -> Iterator[str]:
        """The items of ``name=( ... )``, over several lines."""
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] in " \t\n" or self.text.startswith("\\\n", self.at):
                self.at += 1
            elif self.text[self.at] == "#":
                self._skip_line()
            elif self.text[self.at] in _ENDS:
                self.at += 1
            else:
                yield from self._word()
        self.at += 1

    def _double_quoted(self) -> str:
        self.at += 1
        value = ""
        while self.at < len(self.text) and self.text[self.at] != '"':
            if self.text[self.at] == "\\" and self.text[self.at + 1 : self.at + 2] in ('"', "\\", "$", "`", "\n"):
                value += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            elif self.text[self.at] == "$":
                value += self._expansion()
            else:
                value, self.at = value + self.text[self.at], self.at + 1
        self.at += 1
        return value

    def _expansion(self) -> str:
        """The value of what begins with ``$`` here."""
        if self.text.startswith("$(", self.at):
            return self._substitution()
        if self.text.startswith("${", self.at):
            written = self._balanced("{", "}")
            inner = _BRACED.fullmatch(written[2:-1])
            return self._unknown(written) if inner is None else self._value(inner[1], inner[2], inner[3], written)
        found = _VARIABLE.match(self.text, self.at)
        if found is None:
            self.at += 1
            return "$"
        self.at = found.end()
        return "" if found[1] in set("@*#?$!") else self._value(found[1], None, None, found[0])

    def _balanced(self, opening: str, closing: str) -> str:
        """The text from here to the bracket that closes the first one."""
        start, depth = self.at, 0
        self.at += 1
        while self.at < len(self.text):
            depth += {opening: 1, closing: -1}.get(self.text[self.at], 0)
            self.at += 1
            if depth == 0:
                break
        return self.text[start : self.at]

    def _value(self, name: str, how: str | None, other: str | None, written: str) -> str:
        value = self.variables.get(name)
        if how is None:
            return self._unknown(written) if value is None else value
        if how.endswith("+"):
            return "" if value is None else self.expanded(other or "")
        return self.expanded(other or "") if value is None or (not value and ":" in how) else value

    def expanded(self, text: str) -> str:
        """A text with the variables in it replaced."""
        inner = _Reader(text)
        inner.variables, inner.unset = self.variables, self.unset
        value = ""
        while inner.at < len(inner.text):
            if inner.text[inner.at] == "$":
                value += inner._expansion()
            else:
                value, inner.at = value + inner.text[inner.at], inner.at + 1
        return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value

    def _substitution(self) -> str:
        """``$(expr ...)`` and ``$((...))`` as a number; of another program, whose output nobody knows, the text."""
        written = self._balanced("(", ")")
        inner = written[2:-1].strip()
        if inner == "pwd":
            return "."
        is_arithmetic = inner.startswith("(") and inner.endswith(")")
        formula = inner[1:-1] if is_arithmetic else inner.removeprefix("expr ")
        if not is_arithmetic and formula == inner:
            return self._unknown(written)
        formula = self.expanded(formula).replace("\\*", "*")
        if is_arithmetic:
            formula = re.sub(r"[A-Za-z_]\w*", lambda name: self.variables.get(name[0], name[0]), formula)
        number = _calculated(formula)
        return self._unknown(written) if number is None else str(number)

    def _unknown(self, written: str) -> str:
        """What stays as it is written."""
        self.unset.add(written)
        return written


def _calculated(formula: str) -> int | None:
    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left, operation, right) if type(operation) in _ARITHMETIC:
                return _ARITHMETIC[type(operation)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
        raise ValueError

    try:
        return value(ast.parse(formula.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _split(value: str) -> list[str]:
    """The words of an array or of a variable that is not in quotes."""
    try:
        return shlex.split(value)
    except ValueError:
        return value.split()
