"""The chat in a terminal, and the same over a pipe: lines in, answers out."""

from __future__ import annotations

import secrets
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TextIO

from rlflow.data.errors import RowError
from rlflow.driver.sampling import sample_seed
from rlflow.serving.conversation import Answer, Conversation, TooLongError, check_characters
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Streams
from rlflow.serving.text import Thoughts

COMMANDS = {
    "/image FILE": "shows a picture where the next message has <image>, or before it",
    "/system TEXT": "begins anew with this system prompt; alone shows it, - takes it away",
    "/clear": "begins a new conversation",
    "/help": "shows this",
    "/exit": "leaves, as Ctrl-D does",
}


class Screen(Protocol):
    """Where a chat is seen."""

    def ask(self) -> str | None:
        """The next line; None at the end."""
        ...

    def show(self, text: str, *, is_thought: bool) -> None:
        """A piece of an answer."""
        ...

    def end(self) -> None:
        """An answer is over."""
        ...

    def note(self, text: str) -> None:
        """Something that is not of the policy."""
        ...

    def refuse(self, reason: str) -> None:
        """A message that the policy cannot be asked."""
        ...


class TerminalScreen:
    """With colours, line editing and a history."""

    def __init__(self) -> None:
        from rich.console import Console

        # Importing it gives `input` its line editing; a Python may be built without it.
        with suppress(ImportError):
            import readline  # noqa: F401
        self._console = Console(highlight=False)

    def ask(self) -> str | None:
        lines = []
        while True:
            try:
                line = input("... " if lines else "> ")
            except EOFError:
                self._console.print()
                return None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def show(self, text: str, *, is_thought: bool) -> None:
        from rich.text import Text

        self._console.print(Text(printable(text), style="dim" if is_thought else ""), end="", soft_wrap=True)

    def end(self) -> None:
        self._console.print("\n")

    def note(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(printable(text), style="yellow"), soft_wrap=True)

    def refuse(self, reason: str) -> None:
        self.note(reason)


class PlainScreen:
    """Without a terminal: each line of standard input is said, answers alone go to standard output."""

    def __init__(self, source: TextIO | None = None, output: TextIO | None = None) -> None:
        self._source, self._output = source or sys.stdin, output or sys.stdout
        self._line = 0
        self.num_refused = 0
        """Messages without an answer: their lines of the output are empty."""

    def ask(self) -> str | None:
        line = self._source.readline()
        self._line += 1
        return line.rstrip("\n") if line else None

    def show(self, text: str, *, is_thought: bool) -> None:
        self._output.write(printable(text))
        self._output.flush()

    def end(self) -> None:
        self._output.write("\n")
        self._output.flush()

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr)

    def refuse(self, reason: str) -> None:
        self.num_refused += 1
        self.note(f"line {self._line} has no answer: {reason}")
        self.end()


def printable(text: str) -> str:
    """Without the control characters by which a text could steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def converse(
    conversation: Conversation,
    streams: Streams,
    name: str,
    sampling: Sampling,
    screen: Screen,
) -> None:
    """Until the end of the input, ``/exit``, or Ctrl-C while no answer is written.

    Args:
        name: Of the model that answers.
    """
    with suppress(KeyboardInterrupt):
        _exchange(conversation, streams, name, sampling, screen)


def _exchange(conversation: Conversation, streams: Streams, name: str, sampling: Sampling, screen: Screen) -> None:
    count = 0
    while True:
        line = screen.ask()
        if line is None or line.strip() == "/exit":
            return
        if line.startswith("/"):
            try:
                _obey(line, conversation, screen.note)
            except RowError as error:
                screen.refuse(f"{line.split()[0]}: {error}")
        elif line.strip():
            try:
                _answer(line, conversation, streams, name, sampling, _seed(sampling, count), screen)
            except TooLongError as error:
                screen.refuse(f"{error}; /clear begins anew")
            except RowError as error:
                screen.refuse(str(error))
            count += 1


def _seed(sampling: Sampling, count: int) -> int:
    return secrets.randbits(63) if sampling.seed is None else sample_seed(sampling.seed, "chat", 0, count)


def _answer(
    line: str,
    conversation: Conversation,
    streams: Streams,
    name: str,
    sampling: Sampling,
    seed: int,
    screen: Screen,
) -> None:
    """One answer, as it comes; what was written of one that is stopped stays in the conversation."""
    prompt = conversation.prompt(line)
    answer = Answer(conversation.model, streams, name, prompt, sampling, seed)
    thoughts = Thoughts(prompt.opened)
    is_stopped = False
    try:
        for piece in answer:
            for text, is_thought in thoughts.push(piece):
                screen.show(text, is_thought=is_thought)
        for text, is_thought in thoughts.finish():
            screen.show(text, is_thought=is_thought)
    except KeyboardInterrupt:
        answer.cancel()
        is_stopped = True
    screen.end()
    if is_stopped:
        screen.note("stopped; Ctrl-C once more leaves")
    elif answer.finish_reason == "length":
        is_full = answer.limit == conversation.model.context - len(prompt.token_ids)
        remedy = "the model's context is full, /clear begins anew" if is_full else "--max-new-tokens allows more"
        screen.note(f"cut after {answer.limit:,} tokens: {remedy}")
    conversation.add(line, answer.text, prompt.opened)


def _obey(line: str, conversation: Conversation, note: Callable[[str], None]) -> None:
    """A line that begins with a slash.

    Raises:
        RowError: There is no such command, or it cannot be done.
    """
    command, _, rest = line.strip().partition(" ")
    if command == "/clear":
        conversation.clear()
        note("a new conversation")
    elif command == "/image" and rest.strip():
        conversation.show(rest.strip())
        note(f"the next message shows {rest.strip()}")
    elif command == "/system" and not rest.strip():
        note(conversation.system or "there is no system prompt")
    elif command == "/system":
        check_characters(rest)
        conversation.clear()
        conversation.system = None if rest.strip() == "-" else rest.strip()
        note("a new conversation, with this system prompt" if conversation.system else "a new one, without")
    elif command != "/help":
        raise RowError("there is no such command; /help lists them, and a space before it sends it as a message")
    else:
        note("\n".join(f"{name:<14}{meaning}" for name, meaning in COMMANDS.items()))
