"""Episodes side by side whose environments sleep: how long they take, and the CPU time of a turn.

    python benchmarks/episodes.py [--episodes 64] [--turns 4] [--seconds 0.5 2.0]

A worker's engine thread and turn loop, around an engine that says the same call in every turn, and says it at once:
what is measured is all that is not sleep. Every episode's environment is a process; in each turn it sleeps a time that
its row says, drawn once between the two that are given. The slowest episode's own time is the sum of its sleeps alone.
The environment has been imported before; each round starts a process for each episode.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.environment_episodes import Episodes
from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.data.chat import Chat
from rlflow.environments.tools import described
from rlflow.recipe import EnvironmentBlock
from rlflow.types import GroupRequest, Limits, Prompt, SamplingParams
from tests.rlflow.data.conversations import FAMILIES, tokenizer_of

PLUGIN = '''
import asyncio, time

class Blocking:
    def reset(self, row):
        self.seconds = iter(row["seconds"])
    def step(self, message):
        time.sleep(next(self.seconds))
        return "Go on."

class Coroutine(Blocking):
    async def step(self, message):
        await asyncio.sleep(next(self.seconds))
        return "Go on."

class Methods:
    """TRL's convention: what may be called are methods."""
    def reset(self, seconds, **row):
        self.seconds = iter(seconds)
    def search(self, query: str) -> str:
        """Looks something up.

        Args:
            query: What.
        """
        time.sleep(next(self.seconds))
        return "Nothing was found."

class Coroutines(Methods):
    async def search(self, query: str) -> str:
        """Looks something up.

        Args:
            query: What.
        """
        await asyncio.sleep(next(self.seconds))
        return "Nothing was found."
'''
KINDS = {"Blocking": "step", "Coroutine": "async step", "Methods": "tool", "Coroutines": "async tool"}
SAID = '<tool_call>\n{"name": "search", "arguments": {"query": "the tallest tower of a town"}}\n</tool_call>'


class Repeating(ScriptedEngine):
    """Writes the same tokens in every turn, all of them in one step."""

    def __init__(self, max_num_seqs: int, token_ids: Sequence[int]) -> None:
        super().__init__(max_num_seqs, length=lambda _: len(token_ids), tokens_per_step=len(token_ids))
        self._token_ids = np.array(token_ids, dtype=np.int32)

    def _completion(self, row: Any, reason: Any = None) -> Any:
        made = super()._completion(row, reason)
        made.token_ids[:] = self._token_ids
        return made


def measure(kind: str, file: Path, sleeps: np.ndarray) -> list[dict[str, float]]:
    """Of each of two rounds: seconds, and CPU milliseconds of a turn in the worker and in the environments.

    Args:
        sleeps: float [episodes, turns]: seconds.
    """
    num_episodes, num_turns = sleeps.shape
    tokenizer = tokenizer_of(*FAMILIES["qwen2.5"])
    block = EnvironmentBlock(plugin=f"{file}:{kind}", max_turns=num_turns)
    names: dict[str, Any] = {}
    exec(PLUGIN, names)
    tools = described([names[kind]().search]) if "Method" in kind or kind == "Coroutines" else []
    chat = Chat(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    engine = Repeating(num_episodes, [*tokenizer(SAID, add_special_tokens=False)["input_ids"], end])
    params, limits = SamplingParams(max_new_tokens=200, stop_token_ids=(end,)), Limits(num_turns, 4000, 4000)
    messages = [{"role": "user", "content": "Which is the tallest tower of the town, and who built it?"}]
    token_ids = chat.encode([chat.render_prompt(messages, tools or None)])[0]

    def request(number: int, seconds: Sequence[float]) -> GroupRequest:
        prompt = Prompt("p", token_ids, messages, {"seconds": list(seconds)}, tools=tools)
        return GroupRequest(number, prompt, (number,), params, limits=limits)

    thread = EngineThread(engine, num_episodes)
    thread.episodes = Episodes(
        block, tokenizer, None, go_on=thread.go_on, over=thread.end_episode, fail=thread.fail, at_once=num_episodes
    )
    rounds = []
    try:
        thread.load_weights(lambda: [], 0).result(60)
        play(thread, [request(10**6, [0.0] * num_turns)])
        for number in range(2):
            requests = [request(number * num_episodes + index, row) for index, row in enumerate(sleeps.tolist())]
            own, theirs, began = time.process_time(), children_s(), time.monotonic()
            play(thread, requests)
            seconds = time.monotonic() - began
            turns = sleeps.size / 1000
            worker, environments = (time.process_time() - own) / turns, (children_s() - theirs) / turns
            rounds.append({"seconds": seconds, "worker": worker, "environments": environments})
    finally:
        thread.episodes.close()
        thread.close()
    return rounds


def play(thread: EngineThread, requests: Sequence[GroupRequest]) -> None:
    thread.submit(requests).result(60)
    left = len(requests)
    while left:
        found = thread.take_finished(left, 120)
        left -= len(found)
        for made in (made for group in found for made in group.completions):
            assert made.finish_reason == "turns", made.episode.error


def children_s() -> float:
    """CPU seconds of all processes that this one has started, and they, of their main threads."""
    spent = [
        Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]
        for process in psutil.Process().children(recursive=True)
    ]
    return sum(map(int, spent)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, nargs=2, default=(0.5, 2.0))
    arguments = parser.parse_args()
    least, most = arguments.seconds
    sleeps = np.random.default_rng(0).uniform(least, most, (arguments.episodes, arguments.turns))
    slowest = float(sleeps.sum(axis=1).max())
    print(f"{arguments.episodes} episodes of {arguments.turns} turns; the slowest sleeps {slowest:.2f} s in all\n")
    print("| environment | round | s | of the slowest's own | CPU ms a turn: worker | environments |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "sleeping.py"
        file.write_text(PLUGIN)
        for kind, name in KINDS.items():
            for number, of in enumerate(measure(kind, file, sleeps), 1):
                figures = f"{of['seconds']:.2f} | {of['seconds'] / slowest:.3f}"
                print(f"| {name} | {number} | {figures} | {of['worker']:.1f} | {of['environments']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
