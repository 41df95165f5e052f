"""The turn loop: every episode of a worker, in a thread of its own, beside the engine's.

    engine --completion--> message --> environment's process --reply--> tokens behind the completion --+
      ^                                                                                                |
      +---------------------- go on, from the stream so far, with the next turn's seed <---------------+

The engine never waits for an environment: an episode whose environment speaks has nothing in the engine. What the
policy wrote goes on as tokens; what it heard is never trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np

from rlflow.actors.completion_texts import decode_completions
from rlflow.actors.environment_pool import EnvironmentPool, EnvironmentProcess
from rlflow.data.call_reader import CallReader
from rlflow.data.chat import Chat
from rlflow.data.control_texts import ControlTexts
from rlflow.data.errors import RowError
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import keep_places, with_images
from rlflow.data.transcript import Transcript
from rlflow.environments.protocol import EnvironmentFault
from rlflow.recipe import EnvironmentBlock
from rlflow.types import Completion, Episode, GroupRequest, Message, RolloutEnd, SampleRequest

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PlayedEpisode:
    """A rollout of several turns as the worker made it; its sequences end to end."""

    token_ids: np.ndarray
    """int32 [T]."""
    is_sampled: np.ndarray
    """bool [T]."""
    logprobs: np.ndarray
    """float32 [T]."""
    versions: np.ndarray
    """int32 [T]."""
    finish_reason: RolloutEnd
    episode: Episode


def turn_seed(seed: int, turn: int) -> int:
    """63-bit seed of a turn, from the rollout's; the first turn's is that itself."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()) >> 1


class Episodes:
    """Calls come from the engine's thread. Everything else happens in this one's."""

    def __init__(
        self,
        block: EnvironmentBlock,
        tokenizer: Any,
        template_date: date | None,
        *,
        go_on: Callable[[SampleRequest], Future[None]],
        over: Callable[[int, PlayedEpisode], object],
        fail: Callable[[BaseException], object],
        vision: ImageProcessor | None = None,
        at_once: int,
    ) -> None:
        """
        Args:
            at_once: How many episodes are under way, each with a process; others wait.
            template_date: What the chat template writes where it writes the date.
            go_on: Asks the engine for a turn; `wrote` brings it.
            over: Called with an episode that has ended, and its id.
            fail: Called with what ends the thread.
            vision: Of a model that takes pictures.

        Raises:
            ValueError: There is no such parser of calls.
        """
        self.block, self.tokenizer, self.chat = block, tokenizer, Chat(tokenizer, template_date, vision)
        self.reader = CallReader(self.chat, block.call_parser)
        self.control_texts = ControlTexts(tokenizer)
        self._go_on, self._over, self._fail = go_on, over, fail
        self._room = asyncio.Semaphore(at_once)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._turns: dict[int, asyncio.Future[Completion]] = {}
        self._loop = asyncio.new_event_loop()
        self._pool: EnvironmentPool | None = None
        self._thread = threading.Thread(target=self._run, name="episodes", daemon=True)
        self._thread.start()

    def begin(self, id: int, request: GroupRequest, seed: int) -> None:
        """Begins an episode of a group."""
        self._call(self._begin, id, request, seed)

    def wrote(self, completion: Completion) -> None:
        """Takes a turn that the engine has written."""
        self._call(self._wrote, completion)

    def forget(self, ids: Sequence[int]) -> None:
        """Ends episodes whatever has become of them."""
        self._call(self._forget, tuple(ids))

    def close(self) -> None:
        """Ends all episodes, their processes and the thread."""
        self._call(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _call(self, what: Callable[..., object], *arguments: Any) -> None:
        """Has something done in the loop; nothing where that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._pool = EnvironmentPool(self.block)
            self._loop.run_forever()
        finally:
            if self._pool is not None:
                self._pool.close()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    def _begin(self, id: int, request: GroupRequest, seed: int) -> None:
        assert self._pool is not None
        task = self._loop.create_task(self._play(_Play(self, self._pool, id, request, seed)))
        self._tasks[id] = task
        task.add_done_callback(lambda done: self._ended(id, done))

    def _wrote(self, completion: Completion) -> None:
        turn = self._turns.pop(completion.id, None)
        if turn is not None and not turn.done():
            turn.set_result(completion)

    def _forget(self, ids: Sequence[int]) -> None:
        for id in ids:
            if id in self._tasks:
                self._tasks[id].cancel()

    def _ended(self, id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[id]
        self._turns.pop(id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _play(self, play: _Play) -> None:
        async with self._room:
            self._over(play.id, await play.played())

    async def written(self, sample: SampleRequest) -> Completion:
        """What the policy says next in an episode."""
        self._turns[sample.id] = waited = self._loop.create_future()
        asked = self._go_on(sample)
        asked.add_done_callback(lambda done: self._refused(sample.id, done))
        return await waited

    def _refused(self, id: int, asked: Future[None]) -> None:
        """An engine that does not take a turn ends the episode's task, and with it the worker."""
        error = asked.exception()
        if error is not None:
            self._call(lambda: id in self._turns and self._turns.pop(id).set_exception(error))


class _Play:
    """One episode on its way."""

    def __init__(self, episodes: Episodes, pool: EnvironmentPool, id: int, request: GroupRequest, seed: int) -> None:
        assert request.limits is not None
        self.episodes, self.pool, self.id, self.request, self.seed = episodes, pool, id, request, seed
        self.prompt, self.limits = request.prompt, request.limits
        prompt = self.prompt
        self.transcript = self._transcript(prompt.messages, prompt.token_ids, prompt.images, prompt.engine_token_ids)
        self.began_with: tuple[Message, ...] | None = None
        self.started = math.inf
        self.reward, self.environment_s, self.error = 0.0, 0.0, ""
        self.counts: dict[str, float] = {}
        self.state: Any = None
        self.num_turns = self.num_sampled = 0

    async def played(self) -> PlayedEpisode:
        """Plays it to its end."""
        self.started = time.monotonic()
        process: EnvironmentProcess | None = None
        try:
            try:
                process = await self.pool.begin()
                await self._reset(process)
            except (EnvironmentFault, RowError) as fault:
                self._fail(fault)
            num_prompt, first = len(self.transcript.token_ids), len(self.transcript.messages)
            reason = await self._talk(process, num_prompt)
            if process is not None and not self.error:
                reason = await self._finish(process, reason)
            made = self._made(first, reason)
            if process is not None and not self.error:
                kept, process = process, None
                await self.pool.give_back(kept)
            return made
        finally:
            if process is not None:
                await process.close()

    async def _talk(self, process: EnvironmentProcess | None, num_prompt: int) -> RolloutEnd:
        """The turns. Returns why the episode is over.

        One that could not begin has a single token: a rollout has something that was sampled.
        """
        while True:
            # A token more would be more than the engine was told of.
            room = 1 if self.error else self._room(num_prompt)
            params = replace(self.request.params, max_new_tokens=min(self.request.params.max_new_tokens, room))
            seed = turn_seed(self.seed, self.num_turns)
            said = self.transcript
            sample = SampleRequest(self.id, said.token_ids, seed, params, said.images, said.engine_token_ids)
            completion = await self.episodes.written(sample)
            self.num_turns += 1
            self.num_sampled += len(completion.token_ids)
            problems = self._hear(completion)
            if self.error:
                return "error"
            if completion.finish_reason != "stop":
                return completion.finish_reason
            assert process is not None
            reason = await self._answered(process, problems, num_prompt)
            if reason is not None:
                return reason

    def _hear(self, completion: Completion) -> tuple[str, ...]:
        """Puts a turn into the transcript. Returns why calls in it could not be read."""
        episodes = self.episodes
        stops = [self.request.params.stop_token_ids]
        (text,) = decode_completions(episodes.tokenizer, [completion.token_ids], stops)
        text, problems = self.transcript.opened + text, ()
        message: Message = {"role": "assistant", "content": text}
        if self.transcript.tools or episodes.reader.is_always_needed:
            said = episodes.reader.read(text, self.transcript.tools, self.transcript.before_turn)
            message, problems = said.message, said.problems
            if refused := self.transcript.refusal(message):
                message, problems = {"role": "assistant", "content": text}, (f"no call was made: {refused}",)
            self._count("tool_calls", len(message.get("tool_calls", ())))
            self._count("unread_calls", len(problems))
        self.transcript.wrote(completion, message)
        return problems

    async def _answered(
        self, process: EnvironmentProcess, problems: Sequence[str], num_prompt: int
    ) -> RolloutEnd | None:
        """Has the environment answer what was said last. Returns why the episode is over, if it is."""
        message = self.transcript.messages[-1]
        heard: list[Message] = []
        try:
            if not problems or "tool_calls" in message:
                said = await self._ask(process, "step", message)
                self.reward += said["reward"]
                for name, number in said["counts"].items():
                    self._count(name, number)
                if said["done"]:
                    return "stop"
                heard = said["messages"]
            heard = self._defused(_with_problems(heard, problems))
            if self.num_turns >= self.limits.max_turns:
                return "turns"
            if time.monotonic() - self.started > self.episodes.block.episode_timeout_s:
                return "time"
            self.transcript.heard(heard)
        except (EnvironmentFault, RowError) as fault:
            return self._fail(fault)
        if self._room(num_prompt) < 1:
            self.transcript.forget_last()
            return "length"
        return None

    async def _finish(self, process: EnvironmentProcess, reason: RolloutEnd) -> RolloutEnd:
        try:
            said = await self._ask(process, "finish")
        except EnvironmentFault as fault:
            return self._fail(fault)
        self.reward += said["reward"]
        self.state = said["state"]
        return reason

    async def _reset(self, process: EnvironmentProcess) -> None:
        """Begins, with the row's messages where the environment has none of its own."""
        prompt = self.prompt
        row = {**prompt.columns, "messages": list(prompt.messages)}
        messages = (await self._ask(process, "reset", row, self.seed))["messages"]
        if messages is None:
            return
        system = [message for message in prompt.messages[:1] if message["role"] == "system"]
        if messages and messages[0]["role"] != "system":
            messages = [*system, *messages]
        chat = self.episodes.chat
        messages, images = keep_places(messages, prompt.images)
        messages = self._defused(messages)
        rendered = with_images(chat.render_prompt(messages, list(prompt.tools) or None), messages, images, chat)
        (token_ids,), engine_token_ids = chat.encode([rendered]), None
        if images:
            assert chat.vision is not None
            token_ids, engine_token_ids = chat.vision.expand(token_ids, images), token_ids
        if len(token_ids) > (most := self.limits.max_prompt_tokens):
            raise EnvironmentFault(
                f"reset began with {len(token_ids):,} tokens, and data.max_prompt_tokens is {most:,}: raise it"
            )
        self.transcript = self._transcript(messages, token_ids, images, engine_token_ids)
        self.began_with = tuple(messages)

    async def _ask(self, process: EnvironmentProcess, verb: str, *arguments: Any) -> dict[str, Any]:
        started = time.monotonic()
        try:
            return await process.ask(self.episodes.block.timeout_s, verb, *arguments)
        finally:
            self.environment_s += time.monotonic() - started

    def _transcript(
        self,
        messages: Sequence[Message],
        token_ids: np.ndarray,
        images: tuple[bytes, ...] = (),
        engine_token_ids: np.ndarray | None = None,
    ) -> Transcript:
        stops = self.request.params.stop_token_ids
        return Transcript(self.episodes.chat, stops, messages, self.prompt.tools, token_ids, images, engine_token_ids)

    def _room(self, num_prompt: int) -> int:
        """How many more tokens the episode may have."""
        return self.limits.max_tokens - max(len(self.transcript.token_ids) - num_prompt, self.num_sampled)

    def _defused(self, messages: Sequence[Message]) -> list[Message]:
        """What an environment says, without control tokens."""
        broken, number = self.episodes.control_texts.broken_up(messages)
        self._count("control_texts", number)
        return broken

    def _count(self, name: str, number: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def _fail(self, error: Exception) -> RolloutEnd:
        """Takes a fault of the environment; whatever reward it gave before does not count."""
        self.error = f"environment, turn {self.num_turns}: {error}"
        self.reward = math.nan
        return "error"

    def _made(self, first: int, reason: RolloutEnd) -> PlayedEpisode:
        """
        Args:
            first: Which of the transcript's messages is the first behind the prompt.
        """
        token_ids, is_sampled, logprobs, versions, starts = self.transcript.stream()
        episode = Episode(
            messages=tuple(self.transcript.messages[first:]),
            prompt=self.began_with,
            starts=starts,
            num_turns=self.num_turns,
            reward=self.reward,
            state=self.state,
            error=self.error,
            counts=self.counts,
            environment_s=self.environment_s,
        )
        return PlayedEpisode(token_ids, is_sampled, logprobs, versions, reason, episode)


def _with_problems(heard: Sequence[Message], problems: Sequence[str]) -> Sequence[Message]:
    """What the policy hears, with why calls could not be read at the end of the last message: templates refuse a user's
    message behind results, or write the one before it otherwise."""
    if not problems:
        return heard
    told = "\n".join(problems)
    if not heard:
        return [{"role": "user", "content": told}]
    return [*heard[:-1], {**heard[-1], "content": f"{heard[-1]['content']}\n{told}"}]
