"""Environments and tools that behave, and some that do not."""

from __future__ import annotations

import asyncio
import os
import time

from rlflow.environments import Reply


class Counting:
    """Says back how often it was spoken to, and is over when it hears ``stop``."""

    def __init__(self, reward: float = 0.5) -> None:
        self.reward, self.heard = reward, []

    def reset(self, row):
        self.row = row

    def step(self, message):
        self.heard.append(message["content"])
        if message["content"] == "stop":
            return Reply(done=True, reward=2.0)
        return Reply(f"{self.row['word']}{len(self.heard)}", reward=self.reward, counts={"replies": 1})

    @property
    def state(self):
        return {"heard": self.heard}


class Beginning(Counting):
    """Begins with messages of its own."""

    def reset(self, row):
        super().reset(row)
        return "hello"


class Patient(Counting):
    """A coroutine, which waits."""

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds

    async def step(self, message):
        await asyncio.sleep(self.seconds)
        return super().step(message)


class Sleeping(Counting):
    """Blocks its process."""

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds

    def step(self, message):
        time.sleep(self.seconds)
        return super().step(message)


class Timed(Sleeping):
    """Its state is when it began and ended."""

    def reset(self, row):
        super().reset(row)
        self.began = time.monotonic()

    @property
    def state(self):
        return [self.began, time.monotonic()]


EARLIER = []


class Leaving(Counting):
    """Leaves behind what the next episode of a process would find."""

    def reset(self, row):
        super().reset(row)
        self.found = [*EARLIER, *([os.getcwd()] if os.getcwd() == "/" else [])]

    def step(self, message):
        EARLIER.append(self.row["word"])
        os.chdir("/")

    @property
    def state(self):
        return self.found


class Bad(Counting):
    """Does what no environment may, where the row says so."""

    def reset(self, row):
        super().reset(row)
        if row["word"] == "no reset":
            raise RuntimeError("no such\n\x1b[31mlevel")

    def step(self, message):
        match self.row["word"]:
            case "hangs":
                time.sleep(1000)
            case "raises":
                raise KeyError("lost")
            case "dies":
                os._exit(3)
            case "prints":
                for _ in range(100):
                    print("x" * 2**20)
            case "surrogates":
                # As Python reads bytes that are no text; what is raised goes into files.
                self.heard.append(b"\xff".decode(errors="surrogateescape"))
                return "is\ud83d it"
            case "is no text":
                return 7
            case "is too long":
                return "x" * 2**22
            case "is nan":
                return Reply("a", reward=float("nan"))
            case "is empty":
                return Reply()
        return super().step(message)


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def wait(seconds: float) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "waited"


def divide(a: int, b: int) -> float:
    """Divides two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a / b


def undescribed(a):
    return a


class Guessing:
    """TRL's convention, with a reward of its own, and what is no tool."""

    def __init__(self) -> None:
        self._right, self.shared = False, Counter()
        self.lookup = self.shared.increment

    def reset(self, word: str, **row) -> None:
        self._word = word

    @property
    def early(self):
        raise RuntimeError("it has not begun")

    async def guess(self, word: str) -> str:
        """Guesses.

        Args:
            word: The word.
        """
        self._right = word == self._word
        return "right" if self._right else "wrong"

    async def get_reward(self) -> float:
        return 3.0 if self._right else -1.0


class Counter:
    """TRL's convention."""

    def __init__(self) -> None:
        self.value = 0

    def reset(self, word: str, **row) -> str:
        self.word, self.value = word, 0
        return " Count!"

    def increment(self, by: int) -> int:
        """Counts on.

        Args:
            by: How far.
        """
        self.value += by
        self.reward = self.value / 10
        return self.value
