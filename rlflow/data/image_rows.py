"""Which picture stands where in a row.

The text of a message has ``<image>`` where a picture stands, and the message says under ``images`` how many there are.
What stands there is the next of the column ``images``, or what a content part holds; a row without any place for its
pictures has them in front of its first question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, counted
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.messages import IMAGE_TAG, GivenImage, from_json_text
from rlflow.types import Message

IMAGE_COLUMNS = ("images", "image")
REJECTED_IMAGES = "rejected_images"
"""ms-swift's: the pictures of the losing conversation, where they are others."""


def take_images(columns: dict[str, Any], names: Sequence[str]) -> list[GivenImage]:
    """The pictures of these columns, which are taken out: each of them, or one of them alone.

    Raises:
        RowError: More than one of the columns has pictures.
    """
    if not any(name in columns for name in names):
        return []
    values = {name: from_json_text(columns.pop(name), name) for name in names if name in columns}
    filled = {name: value for name, value in values.items() if value not in (None, "", [])}
    if len(filled) > 1:
        raise RowError(f"both `{'` and `'.join(filled)}` hold pictures: remove one")
    for name, value in filled.items():
        if not isinstance(value, list):
            return [GivenImage(name, value)]
        return [GivenImage(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return []


def place_images(
    messages: Sequence[Message], given: Sequence[GivenImage], vision: ImageProcessor | None, directory: Path
) -> tuple[Sequence[Message], tuple[bytes, ...]]:
    """The messages, each with the number of its pictures, and the pictures in their order.

    Args:
        messages: As ``to_messages`` returns them.
        given: Of the row's column.
        vision: Of the model; None of one that takes text alone.
        directory: What relative paths are relative to.

    Raises:
        RowError: The model takes no pictures, one of them cannot be used, or there are more or fewer than places.
    """
    if vision is None:
        named = [*given, *(image for message in messages for image in message.get("images", ()) if image is not None)]
        if named or any("images" in message for message in messages):
            place = f"`{named[0].place}` is a picture" if named else "its messages have places for pictures"
            raise RowError(f"{place}, and the model takes text alone: train a vision-language model, or leave it out")
        return messages, ()
    places = [_places(message) for message in messages]
    if given and not any(places):
        messages, places = _in_front(messages, places, len(given))
    num_open = sum(image is None for of_message in places for image in of_message)
    if num_open != len(given):
        raise RowError(f"its text has {counted(num_open, IMAGE_TAG)}, and its column {counted(len(given), 'picture')}")
    column = iter(given)
    images = [image or next(column) for of_message in places for image in of_message]
    return [_with_number(*each) for each in zip(messages, places, strict=True)], tuple(
        _loaded(images, vision, directory)
    )


def keep_places(messages: Sequence[Message], images: tuple[bytes, ...]) -> tuple[list[Message], tuple[bytes, ...]]:
    """What an environment begins with, with the pictures of its row where it has their tags; without any tag it shows
    none of them.

    Raises:
        RowError: It has tags for more or fewer than there are.
    """
    counts = [message["content"].count(IMAGE_TAG) if message["role"] != "assistant" else 0 for message in messages]
    if not images or not any(counts):
        return list(messages), ()
    if sum(counts) != len(images):
        raise RowError(
            f"it begins with {counted(sum(counts), IMAGE_TAG)}, and its row has {counted(len(images), 'picture')}"
        )
    return [{**m, "images": n} if n else m for m, n in zip(messages, counts, strict=True)], images


def with_images(rendered: Rendered, messages: Sequence[Message], images: Sequence[bytes], chat: Chat) -> Rendered:
    """A text with the pictures that its messages show.

    Args:
        rendered: What the messages are rendered to.
        messages: The first of the conversation, or all of it.
        images: Of the conversation.
        chat: That rendered it.

    Raises:
        RowError: The template leaves out a picture, or the text has the placeholder of one where there is none.
        DataError: The template shows no picture at all as the model reads it.
    """
    if chat.vision is None:
        return rendered
    shown = sum(message.get("images", 0) for message in messages)
    placeholder = str(chat.tokenizer.convert_ids_to_tokens(chat.vision.image_token_id))
    found = rendered.text.count(placeholder)
    if shown and not found:
        raise DataError(
            f"the chat template writes no {placeholder} where a message shows a picture, and that is what the model "
            "reads one in the place of: set a model.chat_template that does. A model whose processor writes it itself, "
            "as Gemma 3's, is trained on text alone"
        )
    if found != shown:
        raise RowError(
            f"it has {counted(shown, 'picture')}, and the text that the chat template makes of it {placeholder}, the "
            f"place of one, {counted(found, 'time')}"
        )
    return replace(rendered, images=tuple(images[:shown]))


def expand_trained(
    token_ids: np.ndarray, loss_mask: np.ndarray, images: Sequence[bytes], vision: ImageProcessor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask as training sees them, int32 and bool [T]: what stands for a picture is not trained."""
    if not images:
        return token_ids, loss_mask
    assert vision is not None
    sources, is_image = vision.sources(token_ids, images)
    return vision.expand(token_ids, images), loss_mask[sources] & ~is_image


def cuts_image(token_ids: np.ndarray, limit: int, vision: ImageProcessor | None) -> bool:
    """Whether a part of a picture is not among the first ``limit`` of the tokens of ``expand_trained``."""
    return vision is not None and bool((token_ids[limit:] == vision.image_token_id).any())


def _places(message: Message) -> list[GivenImage | None]:
    """What stands in each place of a message for a picture; None where that is the column's next.

    What an assistant writes is text.
    """
    if message["role"] == "assistant":
        return []
    return message.get("images", [None] * message["content"].count(IMAGE_TAG))


def _in_front(
    messages: Sequence[Message], places: list[list[GivenImage | None]], number: int
) -> tuple[list[Message], list[list[GivenImage | None]]]:
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("it has pictures, and no user message that could show them")
    shown = {**messages[first], "content": IMAGE_TAG * number + messages[first]["content"]}
    return (
        [*messages[:first], shown, *messages[first + 1 :]],
        [*places[:first], [None] * number, *places[first + 1 :]],
    )


def _with_number(message: Message, places: Sequence[GivenImage | None]) -> Message:
    others = {key: value for key, value in message.items() if key != "images"}
    return {**others, "images": len(places)} if places else others


def _loaded(images: Sequence[GivenImage], vision: ImageProcessor, directory: Path) -> Iterator[bytes]:
    for image in images:
        try:
            data = vision.load(image.value, directory)
            vision.num_tokens(data)
        except RowError as error:
            raise RowError(f"`{image.place}`: {error}") from error
        yield data
