"""Rows to Prompts: what the policy is asked, rendered and tokenised once, before the run starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.audios import NO_WRITER
from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, Rows
from rlflow.data.formats import Record, with_system
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import with_images
from rlflow.data.overlong import Overlong
from rlflow.data.records import load_records
from rlflow.data.shorten import shorten_prompt, shorten_text
from rlflow.recipe.data_blocks import DataBlock, SourceBlock
from rlflow.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


THOUGHT_BEGINS = re.compile(r"(?:<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\])\s*\Z")


def load_prompts(
    sources: SourceBlock | Sequence[SourceBlock],
    data: DataBlock,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    reject: Callable[[Mapping[str, Any]], str | None] = lambda columns: None,
    tools: Sequence[Any] = (),
    vision: ImageProcessor | None = None,
    *,
    in_turns: bool = False,
) -> Rows[Prompt]:
    """The prompts of the sources, in their order.

    A last assistant turn is an answer, not part of the prompt: it becomes the column ``response`` unless the row has
    one. A row's other columns stay as they are, for reward functions.

    Args:
        sources: those of training, or those of an evaluation.
        data: system message, prompt limit and what is done beyond it.
        tokenizer: renders and tokenises them.
        seed: the run's.
        reject: says of a row's columns why the rewards cannot use them, or None.
        tools: of an environment, described to the policy in every prompt before the row's own.
        in_turns: an environment answers the policy, by the chat template.
        vision: of a model that takes pictures; they count as the tokens that training sees in their places.

    Returns:
        The prompts; ``skipped`` names the rows that were left out, bad or overlong.

    Raises:
        DataError: a source or too many of its rows cannot be used, prompts are overlong, or the model hears.
    """
    chat = Chat(tokenizer, data.template_date, _of_a_writer(vision))

    def build(record: Record) -> tuple[Record, Rendered]:
        if problem := reject(record.columns):
            raise RowError(problem)
        if in_turns:
            require_chat(record)
        return _render(record, data, chat, tools)

    rows = load_records(sources, seed, build, vision=vision)
    overlong = Overlong("max_prompt_tokens", data.max_prompt_tokens, data.overlong)
    prompts: Rows[Prompt] = Rows(skipped=rows.skipped)
    for row, engine_token_ids in zip(rows, chat.encode([row.value[1] for row in rows]), strict=True):
        asked, rendered = row.value
        images = rendered.images
        token_ids = engine_token_ids if vision is None or not images else vision.expand(engine_token_ids, images)
        if len(token_ids) > data.max_prompt_tokens:
            if overlong.leaves_out(row, len(token_ids)):
                continue
            try:
                token_ids, asked = _shorten(asked, rendered, token_ids, data.max_prompt_tokens, chat)
            except RowError as error:
                prompts.skipped.append(row.bad(str(error)))
                continue
        prompts.append(_prompt(row.id, asked, rendered, token_ids, engine_token_ids))
        prompts.notes.extend(row.bad(note) for note in rendered.notes)
    overlong.settle(prompts)
    return prompts


def _of_a_writer(vision: ImageProcessor | None) -> ImageProcessor | None:
    """What a model that engines write from takes of pictures.

    Raises:
        DataError: It is of a model that hears.
    """
    if vision is not None and vision.takes_audios:
        raise DataError(f"the model hears, and {NO_WRITER}")
    return vision


def _prompt(id: str, asked: Record, rendered: Rendered, token_ids: np.ndarray, engine_token_ids: np.ndarray) -> Prompt:
    images, opened, tools = rendered.images, opened_tag(rendered.text), tuple(asked.tools or ())
    given = engine_token_ids if images else None
    return Prompt(id, token_ids, asked.messages, asked.columns, opened, tools, images, given)


def opened_tag(text: str) -> str:
    """The tag that begins a thought at the end of a prompt, with the white space behind it; empty where there is none.

    Generation prompts of reasoning models end with ``<think>``, and so do prompts for base models.
    """
    found = THOUGHT_BEGINS.search(text)
    return found[0] if found else ""


def require_chat(record: Record) -> None:
    """Raises RowError where no chat template has rendered a row, and none could render what is answered to it."""
    if record.text is not None:
        raise RowError(
            "it is plain text, and what an environment answers is rendered by the chat template: give messages or a "
            "prompt (format), or remove environment"
        )


def _render(record: Record, data: DataBlock, chat: Chat, tools: Sequence[Any]) -> tuple[Record, Rendered]:
    """What is asked of a row, and how it is written."""
    if record.text is not None:
        messages = [{"role": "user", "content": record.text}]
        rendered = with_images(chat.render_text(record.text, complete=False), messages, (), chat)
        return replace(record, messages=messages, tools=None), rendered
    messages, columns = list(record.messages), record.columns
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()
        columns = {"response": answer["content"], **columns}
    if not any(message["role"] == "user" for message in messages):
        raise RowError("no user message is left when the answer is taken off")
    messages = with_system(messages, data.system)
    described = [*tools, *(record.tools or ())] or None
    rendered = with_images(chat.render_prompt(messages, described), messages, record.images, chat)
    return replace(record, messages=messages, columns=columns, tools=described), rendered


def _shorten(
    asked: Record, rendered: Rendered, token_ids: np.ndarray, limit: int, chat: Chat
) -> tuple[np.ndarray, Record]:
    """
    Raises:
        RowError: It cannot be cut.
    """
    if rendered.images:
        raise RowError(f"{len(token_ids):,} tokens, and a prompt with pictures is not cut")
    if asked.text is not None:
        return shorten_text(token_ids, limit, chat.tokenizer.bos_token_id), asked
    try:
        token_ids, messages = shorten_prompt(chat, asked.messages, asked.tools, limit)
    except RowError as error:
        raise RowError(f"cannot be cut to {limit:,} tokens: {error}") from error
    return token_ids, replace(asked, messages=messages)
