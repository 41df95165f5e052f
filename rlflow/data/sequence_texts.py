"""Columns to the texts of a sequence: plain text, one message, or a conversation that the chat template writes.

A message that stands alone is its text (behind a system message, that and a space), so that what encodes texts, such as
sentence-transformers, reads what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import RowError
from rlflow.data.image_rows import COLUMNS, cuts_image, place_images, take_images, with_images
from rlflow.data.messages import from_json_text, to_message, to_messages
from rlflow.data.sequence_format import SequenceFormat, encode_alone
from rlflow.data.sources import kind
from rlflow.types import Message

_TEXT_ALONE = "text alone that is embedded, ranked and classified in pairs: classification sees pictures of one text"
_MEDIA = ("images", "videos", "audios", "image", "video", "audio")
Words = str | list[Message]
"""A text, or a conversation of several messages."""
Text = tuple[str, ...] | Rendered
"""What becomes one sequence: a text, a query and a document, or a conversation as the chat template writes it."""


class Encoded(NamedTuple):
    """A text as a sequence."""

    token_ids: np.ndarray
    """int32 [T], with all tokens that stand for its pictures."""
    num_tokens: int
    """Before it was cut."""
    problem: str | None = None
    """Why what is left of it cannot be used."""


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
        if len(said) != 1 or any("images" in message for message in messages):
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
    """One sequence of it.

    Raises:
        RowError: It shows pictures.
    """
    if isinstance(words, str):
        return (chat.check_characters(words),)
    _refuse_shown(words)
    return chat.render_whole(words)


def seen(words: Words, columns: Mapping[str, Any], directory: Path, chat: Chat) -> Text:
    """One sequence of it with the row's pictures and videos; what shows some is a conversation.

    Args:
        columns: Of the row; those of pictures are looked at.
        directory: What relative paths of pictures are relative to.

    Raises:
        RowError: The model takes no pictures, one of them cannot be used, or there are more or fewer than places.
    """
    media = {name: columns[name] for name in (*COLUMNS["image"], *COLUMNS["video"]) if name in columns}
    given = take_images(media, COLUMNS["image"], "image") + take_images(media, COLUMNS["video"], "video")
    messages: list[Message] = [{"role": "user", "content": words}] if isinstance(words, str) else words
    placed, images = place_images(messages, given, chat.vision, directory)
    if not images:
        return alone(words, chat)
    return with_images(chat.render_whole(placed), placed, images, chat)


def together(query: Words, document: Words, chat: Chat) -> Text:
    """One sequence of both: two texts, or a conversation and its answer.

    Raises:
        RowError: One of them shows pictures.
    """
    for words in (query, document):
        if not isinstance(words, str):
            _refuse_shown(words)
    if isinstance(query, str) and isinstance(document, str):
        return (chat.check_characters(query), chat.check_characters(document))
    before: list[Message] = [{"role": "user", "content": query}] if isinstance(query, str) else query
    behind = [to_message({"role": "assistant", "content": document}, "")] if isinstance(document, str) else document
    return chat.render_whole([*before, *behind])


def encode_texts(texts: Sequence[Text], chat: Chat, form: SequenceFormat, max_tokens: int) -> list[Encoded]:
    """Each text as a sequence of at most ``max_tokens``."""
    plain = list(dict.fromkeys(word for text in texts if not isinstance(text, Rendered) for word in text))
    ids = dict(zip(plain, encode_alone(chat.tokenizer, plain), strict=True))
    rendered = iter(chat.encode([text for text in texts if isinstance(text, Rendered)]))
    encoded = []
    for text in texts:
        if isinstance(text, Rendered):
            encoded.append(_conversation(text, next(rendered), chat, form, max_tokens))
        else:
            words = [ids[word] for word in text]
            cut_off = (
                "its first text leaves no room for the second" if len(words) > 1 else "there is no room for a text"
            )
            problem = None if form.room(words, max_tokens) > 0 else f"{cut_off} in {max_tokens:,} tokens"
            encoded.append(Encoded(form.joined(words, max_tokens), form.num_tokens(words), problem))
    return encoded


def _conversation(text: Rendered, token_ids: np.ndarray, chat: Chat, form: SequenceFormat, max_tokens: int) -> Encoded:
    """A conversation; of a model that sees as its processor reads one, which puts around it what stands around a text
    unless it begins with bos itself.

    Args:
        token_ids: int32 [T], with one placeholder a picture.
    """
    if chat.vision is None:
        return Encoded(token_ids[:max_tokens], len(token_ids))
    whole = chat.vision.expand(token_ids, text.images)
    bos = chat.tokenizer.bos_token
    if isinstance(bos, str) and text.text.startswith(bos):
        kept, num_tokens, room = whole[:max_tokens], len(whole), max_tokens
    else:
        kept, num_tokens = form.joined([whole], max_tokens), form.num_tokens([whole])
        room = form.room([whole], max_tokens)
    cut = f"its pictures end behind {max_tokens:,} tokens, and a picture is not cut"
    return Encoded(kept, num_tokens, cut if cuts_image(whole, max(0, room), chat.vision) else None)


def first_of(columns: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that is given; CSV and Parquet write what is absent as empty."""
    return next((name for name in names if name in columns and columns[name] is not None and columns[name] != []), None)


def refuse_media(columns: Mapping[str, Any], *, sees: bool = False) -> None:
    """
    Args:
        sees: Texts are shown with pictures and videos.

    Raises:
        RowError: A row has pictures, videos or sound that are not read.
    """
    bare = {name: name.removeprefix("positive_").removeprefix("negative_") for name in columns}
    read = (*COLUMNS["image"], *COLUMNS["video"]) if sees else ()
    if given := [name for name in columns if bare[name] in _MEDIA and name not in read and columns[name]]:
        reason = "sound is not read" if "audio" in given[0] else f"it is {_TEXT_ALONE}"
        raise RowError(f"`{given[0]}` is not empty, and {reason}")


def _refuse_shown(messages: Sequence[Message]) -> None:
    if any("images" in message for message in messages):
        raise RowError(f"its messages show pictures, and it is {_TEXT_ALONE}")


def _non_empty(text: str, name: str) -> str:
    if not text.strip():
        raise RowError(f"`{name}` is empty")
    return text


def _may_be_messages(value: Any) -> bool:
    """Whether a text is JSON of messages, as CSV has them."""
    return isinstance(value, str) and value.lstrip().startswith('[{"')
