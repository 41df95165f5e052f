"""A worker's engine thread and turn loop around an engine that says what a test wrote, a character a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.environment_episodes import Episodes, PlayedEpisode
from rlflow.actors.rollout_engines.engine import RolloutEngine
from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import EnvironmentBlock
from rlflow.types import GroupRequest, Limits, Prompt, SamplingParams

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ;\n !<>?:{}\"_,()./'|=+-"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% if message['role'] == 'assistant' %}<eos>{% else %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TOKENIZER = build_character_tokenizer(CHARACTERS, TEMPLATE)
EOS = 1
LIMITS = Limits(max_turns=4, max_tokens=400, max_prompt_tokens=100)
PLUGINS = Path(__file__).with_name("environment_plugins.py")
Says = Callable[[str], str]


class TalkingEngine(ScriptedEngine):
    """Says what ``says`` makes of all that is before; ``...`` at its end is never finished."""

    def __init__(self, says: Says, max_num_seqs: int = 64) -> None:
        super().__init__(max_num_seqs, length=lambda request: len(self._tokens(request)))
        self._says = says
        self.asked: list[Any] = []

    def add(self, requests) -> None:
        self.asked += requests
        super().add(requests)

    def _tokens(self, request) -> list[int]:
        text = self._says(decode(request.token_ids))
        ids = encode(text.removesuffix("...")) + ([] if text.endswith("...") else [EOS])
        return ids[: request.params.max_new_tokens]

    def _completion(self, row, reason=None):
        made = super()._completion(row, reason)
        made.token_ids[:] = self._tokens(row.request)[: len(made.token_ids)]
        stopped = made.token_ids[-1] == EOS
        return type(made)(
            made.id, made.token_ids, made.logprobs, made.versions, reason or ("stop" if stopped else "length")
        )


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def decode(token_ids: Sequence[int] | np.ndarray) -> str:
    return TOKENIZER.decode(np.asarray(token_ids).tolist(), skip_special_tokens=False)


def prompt_of(columns: dict[str, Any], text: str = "go", tools: Sequence[Any] = ()) -> Prompt:
    messages = [{"role": "user", "content": text}]
    rendered = TOKENIZER.apply_chat_template(
        messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )
    return Prompt("p", np.array(encode(rendered), dtype=np.int32), messages, columns, tools=tools)


def request_of(
    id: int, prompt: Prompt, *, seeds: Sequence[int] = (5,), limits: Limits = LIMITS, max_new_tokens: int = 100
) -> GroupRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=(EOS,))
    return GroupRequest(id, prompt, tuple(seeds), params, limits=limits)


def block_of(plugin: str = "", tools: Sequence[str] = (), **keys: Any) -> EnvironmentBlock:
    named = {"plugin": f"{PLUGINS}:{plugin}"} if plugin else {"tools": [f"{PLUGINS}:{tool}" for tool in tools]}
    return EnvironmentBlock(**named, **keys)


@contextmanager
def worker(engine: RolloutEngine, block: EnvironmentBlock, at_once: int = 64) -> Iterator[EngineThread]:
    """The engine's thread with a turn loop, and the first weights."""
    thread = EngineThread(engine, 64)
    thread.episodes = Episodes(
        block, TOKENIZER, None, go_on=thread.go_on, over=thread.end_episode, fail=thread.fail, at_once=at_once
    )
    thread.load_weights(lambda: [], 0).result(10)
    try:
        yield thread
    finally:
        thread.episodes.close()
        thread.close(10)


def play(says: Says, block: EnvironmentBlock, *requests: GroupRequest) -> list[tuple[PlayedEpisode, ...]]:
    """The episodes of each request, by a worker of their own."""
    engine = TalkingEngine(says)
    with worker(engine, block) as thread:
        thread.submit(requests).result(10)
        groups: dict[int, tuple[Any, ...]] = {}
        while len(groups) < len(requests):
            found = thread.take_finished(16, 60)
            assert found, "no episode ended within a minute"
            groups |= {group.request.id: group.completions for group in found}
    return [groups[request.id] for request in requests]


def text_of(episode: PlayedEpisode) -> str:
    """All of its tokens, those that were sampled in brackets."""
    parts, sampled = [], False
    for token, is_sampled in zip(episode.token_ids, episode.is_sampled, strict=True):
        if is_sampled != sampled:
            parts.append("[" if is_sampled else "]")
            sampled = bool(is_sampled)
        parts.append(decode([token]))
    return "".join(parts) + ("]" if sampled else "")
