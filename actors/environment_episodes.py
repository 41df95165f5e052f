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
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np

from rlflow.actors.completion_texts import decode_completions
from rlflow.actors.environment_pool import EnvironmentPool, EnvironmentProcess
from rlflow.data.call_reader import CallReader
from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import RowError
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


@dataclass(slots=True)
class _State:
    """What has happened in an episode so far."""

    reward: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    state: Any = None
    environment_s: float = 0.0
    num_turns: int = 0
    num_sampled: int = 0
    error: str = ""

    def count(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    def fail(self, error: Exception) -> RolloutEnd:
        """Takes a fault of the environment; whatever reward it gave before does not count."""
        self.error = f"environment, turn {self.num_turns}: {error}"
        self.reward = math.nan
        return "error"


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
    ) -> None:
        """
        Args:
            template_date: What the chat template writes where it writes the date.
            go_on: Asks the engine for a turn; `wrote` brings it.
            over: Called with an episode that has ended, and its id.
            fail: Called with what ends the thread.

        Raises:
            ValueError: There is no such parser of calls.
        """
        self.block, self.tokenizer, self.chat = block, tokenizer, Chat(tokenizer, template_date)
        self._reader = CallReader(self.chat, block.call_parser)
        self._go_on, self._over, self._fail = go_on, over, fail
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
        task = self._loop.create_task(self._episode(id, request, seed))
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

    async def _episode(self, id: int, request: GroupRequest, seed: int) -> None:
        assert self._pool is not None and request.prompt is not None and request.limits is not None
        state, started = _State(), time.monotonic()
        transcript = self._transcript(request, request.prompt.messages, request.token_ids)
        process: EnvironmentProcess | None = None
        begun_with: tuple[Message, ...] | None = None
        reason: RolloutEnd | None = None
        try:
            try:
                process = await self._pool.begin()
                if (messages := await self._reset(process, request, seed, state)) is not None:
                    transcript, begun_with = self._begun_with(request, messages), tuple(messages)
            except (EnvironmentFault, RowError) as fault:
                reason = state.fail(fault)
            num_prompt, first = len(transcript.token_ids), len(transcript.messages)
            while True:
                room = self._room(request, transcript, num_prompt, state) if reason is None else 1
                completion = await self._turn(id, request, seed, transcript, state.num_turns, room)
                state.num_turns += 1
                state.num_sampled += len(completion.token_ids)
                problems = self._hear(completion, request, transcript, state)
                if reason is not None:
                    break
                if completion.finish_reason != "stop":
                    reason = completion.finish_reason
                    break
                assert process is not None
                reason = await self._answered(process, request, transcript, problems, state, num_prompt, started)
                if reason is not None:
                    break
            if process is not None and reason != "error":
                reason = await self._finished(process, state, reason)
            self._over(id, _played(transcript, first, begun_with, state, reason))
        finally:
            if process is not None:
                await process.close()

    async def _turn(
        self, id: int, request: GroupRequest, seed: int, transcript: Transcript, turn: int, room: int
    ) -> Completion:
        """What the policy says next."""
        params = replace(request.params, max_new_tokens=min(request.params.max_new_tokens, room))
        self._turns[id] = waited = self._loop.create_future()
        asked = self._go_on(SampleRequest(id, transcript.token_ids, turn_seed(seed, turn), params))
        asked.add_done_callback(lambda done: self._refused(id, done))
        return await waited

    def _refused(self, id: int, asked: Future[None]) -> None:
        """An engine that does not take a turn ends the episode's task, and with it the worker."""
        error = asked.exception()
        if error is not None:
            self._call(lambda: id in self._turns and self._turns.pop(id).set_exception(error))

    def _hear(
        self, completion: Completion, request: GroupRequest, transcript: Transcript, state: _State
    ) -> tuple[str, ...]:
        """Puts a turn into the transcript. Returns why calls in it could not be read."""
        (text,) = decode_completions(self.tokenizer, [completion.token_ids], [request.params.stop_token_ids])
        text, problems = transcript.opened + text, ()
        message: Message = {"role": "assistant", "content": text}
        if transcript.tools or self._reader.is_always_needed:
            said = self._reader.read(text, transcript.tools)
            message, problems = said.message, said.problems
            state.count("tool_calls", len(message.get("tool_calls", ())))
            state.count("unread_calls", len(problems))
        transcript.wrote(completion, message)
        return problems

    async def _answered(
        self,
        process: EnvironmentProcess,
        request: GroupRequest,
        transcript: Transcript,
        problems: Sequence[str],
        state: _State,
        num_prompt: int,
        started: float,
    ) -> RolloutEnd | None:
        """Has the environment answer what was said last. Returns why the episode is over, if it is."""
        assert request.limits is not None
        message = transcript.messages[-1]
        left_s = self.block.episode_timeout_s - (time.monotonic() - started)
        complaint: list[Message] = [{"role": "user", "content": "\n".join(problems)}] if problems else []
        try:
            if problems and "tool_calls" not in message:
                heard = complaint
            else:
                if left_s <= 0:
                    return "time"
                said = await self._ask(process, state, "step", message)
                state.reward += said["reward"]
                for name, number in said["counts"].items():
                    state.count(name, number)
                if said["done"]:
                    return "stop"
                heard = [*said["messages"], *complaint]
            if state.num_turns >= request.limits.max_turns:
                return "turns"
            if time.monotonic() - started > self.block.episode_timeout_s:
                return "time"
            transcript.heard(heard)
        except (EnvironmentFault, RowError) as fault:
            return state.fail(fault)
        if self._room(request, transcript, num_prompt, state) < 1:
            transcript.forget_last()
            return "length"
        return None

    async def _finished(self, process: EnvironmentProcess, state: _State, reason: RolloutEnd) -> RolloutEnd:
        try:
            said = await self._ask(process, state, "finish")
        except EnvironmentFault as fault:
            return state.fail(fault)
        state.reward += said["reward"]
        state.state = said["state"]
        return reason

    async def _reset(
        self, process: EnvironmentProcess, request: GroupRequest, seed: int, state: _State
    ) -> list[Message] | None:
        """What the episode begins with; None where the row's messages stand."""
        assert request.prompt is not None
        prompt = request.prompt
        row = {**prompt.columns, "messages": list(prompt.messages)}
        messages = (await self._ask(process, state, "reset", row, seed))["messages"]
        system = [message for message in prompt.messages[:1] if message["role"] == "system"]
        return [*system, *messages] if messages and messages[0]["role"] != "system" else messages

    async def _ask(self, process: EnvironmentProcess, state: _State, verb: str, *arguments: Any) -> dict[str, Any]:
        started = time.monotonic()
        try:
            return await process.ask(self.block.timeout_s, verb, *arguments)
        finally:
            state.environment_s += time.monotonic() - started

    def _transcript(self, request: GroupRequest, messages: Sequence[Message], token_ids: np.ndarray) -> Transcript:
        assert request.prompt is not None
        return Transcript(self.chat, request.params.stop_token_ids, messages, request.prompt.tools, token_ids)

    def _begun_with(self, request: GroupRequest, messages: list[Message]) -> Transcript:
        assert request.prompt is not None and request.limits is not None
        rendered: Rendered = self.chat.render_prompt(messages, list(request.prompt.tools) or None)
        token_ids = self.chat.encode([rendered])[0]
        if len(token_ids) > (most := request.limits.max_prompt_tokens):
            raise EnvironmentFault(
                f"reset began with {len(token_ids):,} tokens, and data.max_prompt_tokens is {most:,}: raise it"
            )
        return self._transcript(request, messages, token_ids)

    def _room(self, request: GroupRequest, transcript: Transcript, num_prompt: int, state: _State) -> int:
        """How many more tokens the episode may have."""
        assert request.limits is not None
        return request.limits.max_tokens - max(len(transcript.token_ids) - num_prompt, state.num_sampled)


def _played(
    transcript: Transcript,
    first: int,
    begun_with: tuple[Message, ...] | None,
    state: _State,
    reason: RolloutEnd,
) -> PlayedEpisode:
    """
    Args:
        first: Which of the transcript's messages is the first behind the prompt.
    """
    token_ids, is_sampled, logprobs, versions, starts = transcript.stream()
    episode = Episode(
        messages=tuple(transcript.messages[first:]),
        prompt=begun_with,
        starts=starts,
        num_turns=state.num_turns,
        reward=state.reward,
        state=state.state,
        error=state.error,
        counts=state.counts,
        environment_s=state.environment_s,
    )
    return PlayedEpisode(token_ids, is_sampled, logprobs, versions, reason, episode)
