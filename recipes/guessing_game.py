"""A game over several turns: the policy finds a number, and hears after each guess whether it is lower or higher."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rlflow.environments import Reply

NUMBERS = 32
LOWER, HIGHER, BEGIN = "<", ">", "?"


class GuessingGame:
    """A row's column ``secret`` is the number; 1 is given for finding it, less 0.1 for each guess before."""

    def reset(self, row: Mapping[str, Any]) -> None:
        self.secret, self.guesses = int(row["secret"]), 0

    def step(self, message: Mapping[str, Any]) -> Reply:
        self.guesses += 1
        guess = message["content"]
        if not guess.isdigit():
            return Reply(done=True, counts={"no_number": 1})
        if int(guess) == self.secret:
            return Reply(done=True, reward=1.0 - 0.1 * (self.guesses - 1), counts={"found": 1})
        return Reply(LOWER if self.secret < int(guess) else HIGHER)

    @property
    def state(self) -> dict[str, int]:
        return {"secret": self.secret, "guesses": self.guesses}


def questions(repeats: int = 1) -> list[dict[str, Any]]:
    """Every number, so many times."""
    return [{"prompt": BEGIN, "secret": str(secret)} for _ in range(repeats) for secret in range(NUMBERS)]


def careless_games(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Games of somebody who guesses anything that can still be: the rules are in them, and no plan."""
    draw = random.Random(seed)
    games = []
    for _ in range(rows):
        secret, low, high = draw.randrange(NUMBERS), 0, NUMBERS - 1
        messages = [{"role": "user", "content": BEGIN}]
        while True:
            guess = draw.randint(low, high)
            messages.append({"role": "assistant", "content": f"{guess:02d}"})
            if guess == secret or len(messages) > 11:
                break
            messages.append({"role": "user", "content": LOWER if secret < guess else HIGHER})
            low, high = (low, guess - 1) if secret < guess else (guess + 1, high)
        games.append({"messages": messages})
    return games
