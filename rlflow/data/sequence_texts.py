"""Columns to the texts of a sequence: plain text, one message, or a conversation that the chat template writes.

A message that stands alone is its text (behind a system message, that and a space), so that what encodes texts, such as
sentence-transformers, reads what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import RowError
from rlflow.data.messages import from_json_text, to_message, to_messages
from rlflow.data.sequence_format import SequenceFormat, encode_alone
from rlflow.data.sources import kind
from rlflow.types import Message

_MEDIA = ("images", "videos", "audios", "image", "video", "audio")
Words = str | list[Message]
"""A text, or a conversation of several messages."""
Text = tuple[str, ...] | Rendered
"""What becomes one sequence: a text, a query and a document, or a conversation as the chat template writes it."""


def words_of(value: Any, name: str) -> Words:
    """What a column holds: a text, a message, or messages.

    Raises:
        RowError: It is something else, or empty.
    """
    value = _listed(value, name) if _may_be_messages(value) else value
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = to_messages(value, name)
        said = [message for message in messages if message["role"] != "system"]
        if len(said) != 1:
            return messages
        return _non_empty(" ".join(message["content"] for message in messages if message["content"]), name)
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, not text")
    return _non_empty(value, name)


def several_of(value: Any, name: str) -> list[Words]:
    """What a column of documents holds: one, or a list of them; ms-swift's are lists of messages each.

    Raises:
        RowError: It is something else, or one of them is empty.
    """
    value = _listed(value, name)
    if not isinstance(value, list):
        return [words_of(value, name)]
    if value and all(isinstance(item, dict) for item in value):
        return [words_of(value, name)]
    return [words_of(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _listed(value: Any, name: str) -> Any:
    """The list that a text column holds as JSON, as of CSV; a text that only begins like one is itself.

    Raises:
        RowError: A column of messages is no JSON.
    """
    if not isinstance(value, str) or name.endswith("messages"):
        return from_json_text(value, name)
    try:
        found = from_json_text(value, name)
    except RowError:
        return value
    return found if found and all(isinstance(item, str | dict | list) for item in found) else value


def alone(words: Words, chat: Chat) -> Text:
    """One sequence of it."""
    if isinstance(words, str):
        return (chat.check_characters(words),)
    return chat.render_whole(words)


def together(query: Words, document: Words, chat: Chat) -> Text:
    """One sequence of both: two texts, or a conversation and its answer."""
    if isinstance(query, str) and isinstance(document, str):
        return (chat.check_characters(query), chat.check_characters(document))
    before: list[Message] = [{"role": "user", "content": query}] if isinstance(query, str) else query
    behind = [to_message({"role": "assistant", "content": document}, "")] if isinstance(document, str) else document
    return chat.render_whole([*before, *behind])


def encode_texts(
    texts: Sequence[Text], chat: Chat, form: SequenceFormat, max_tokens: int
) -> list[tuple[np.ndarray, int]]:
    """Each text as int32 [T] of at most ``max_tokens``, and how many tokens it had before it was cut."""
    plain = list(dict.fromkeys(word for text in texts if not isinstance(text, Rendered) for word in text))
    ids = dict(zip(plain, encode_alone(chat.tokenizer, plain), strict=True))
    rendered = iter(chat.encode([text for text in texts if isinstance(text, Rendered)]))
    encoded = []
    for text in texts:
        if isinstance(text, Rendered):
            whole = next(rendered)
            encoded.append((whole[:max_tokens], len(whole)))
        else:
            words = [ids[word] for word in text]
            encoded.append((form.joined(words, max_tokens), form.num_tokens(words)))
    return encoded


def first_of(columns: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that is given; CSV and Parquet write what is absent as empty."""
    return next((name for name in names if name in columns and columns[name] is not None and columns[name] != []), None)


def refuse_media(columns: Mapping[str, Any]) -> None:
    """
    Raises:
        RowError: A row has pictures, videos or sound.
    """
    bare = {name: name.removeprefix("positive_").removeprefix("negative_") for name in columns}
    if given := [name for name in columns if bare[name] in _MEDIA and columns[name]]:
        raise RowError(f"`{given[0]}` is not empty; only text is supported")


def _non_empty(text: str, name: str) -> str:
    if not text.strip():
        raise RowError(f"`{name}` is empty")
    return text


def _may_be_messages(value: Any) -> bool:
    """Whether a text is JSON of messages, as CSV has them."""
    return isinstance(value, str) and value.lstrip().startswith('[{"')
