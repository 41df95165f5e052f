"""Which picture, video or recording stands where in a row.

The text of a message has ``<image>`` where a picture stands, ``<video>`` where a video does and ``<audio>`` where a
recording does. The message says under ``images`` how many there are of all, and under ``videos`` and ``audios`` how
many of them are such.
What stands there is the next of the column ``images``, ``videos`` or ``audios``, or what a content part holds; a row
without any place for those of a kind has them in front of its first question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlflow.data.audios import kind_of
from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, counted
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.messages import COUNTS, MEDIA_TAGS, TAGS, GivenImage, Kind, from_json_text
from rlflow.types import Message

COLUMNS: dict[Kind, tuple[str, str]] = {kind: (name, kind) for kind, name in COUNTS.items()}
NAMES: dict[Kind, str] = {"image": "picture", "video": "video", "audio": "recording"}
REJECTED_IMAGES = "rejected_images"
"""ms-swift's: the pictures of the losing conversation, where they are others."""
_KIND_OF_TAG: dict[str, Kind] = {tag: kind for kind, tag in TAGS.items()}
_INSTEAD: dict[Kind, str] = {
    "image": "train a vision-language model, or leave it out",
    "video": "give the frames that matter as `images`, with an <image> for each",
    "audio": "train a model that hears, such as Qwen2-Audio, or give what is said as text",
}


class Place(NamedTuple):
    """Where a picture, a video or a recording stands."""

    kind: Kind
    given: GivenImage | None
    """None where what stands there is the column's next."""


def take_images(columns: dict[str, Any], names: Sequence[str], kind: Kind) -> list[GivenImage]:
    """The pictures, videos or recordings of these columns, which are taken out: each of them, or one of them alone.

    Raises:
        RowError: More than one of the columns has some.
    """
    if not any(name in columns for name in names):
        return []
    values = {name: from_json_text(columns.pop(name), name) for name in names if name in columns}
    filled = {name: value for name, value in values.items() if value not in (None, "", [])}
    if len(filled) > 1:
        raise RowError(f"both `{'` and `'.join(filled)}` hold {NAMES[kind]}s: remove one")
    for name, value in filled.items():
        if not isinstance(value, list):
            return [GivenImage(name, value, kind)]
        return [GivenImage(f"{name}[{index}]", item, kind) for index, item in enumerate(value)]
    return []


def place_images(
    messages: Sequence[Message], given: Sequence[GivenImage], vision: ImageProcessor | None, directory: Path
) -> tuple[Sequence[Message], tuple[bytes, ...]]:
    """The messages, each with the number of its pictures, videos and recordings, and those in their order.

    Args:
        messages: As ``to_messages`` returns them.
        given: Of the row's columns.
        vision: Of the model; None of one that takes text alone.
        directory: What relative paths are relative to.

    Raises:
        RowError: The model takes none, one of them cannot be used, or there are more or fewer than places.
    """
    named = [*given, *(image for message in messages for image in message.get("images", ()) if image is not None)]
    if vision is None:
        if named or any("images" in message for message in messages):
            one = f"`{named[0].place}` is a {NAMES[named[0].kind]}" if named else "its messages have places for some"
            instead = _INSTEAD["audio" if named and named[0].kind == "audio" else "image"]
            raise RowError(f"{one}, and the model takes text alone: {instead}")
        return messages, ()
    if others := [image for image in named if image.kind not in vision.kinds]:
        first = others[0]
        raise RowError(f"`{first.place}` is a {NAMES[first.kind]}, and the model takes none: {_INSTEAD[first.kind]}")
    places = [_places(message, vision.kinds) for message in messages]
    held = {place.kind for of_message in places for place in of_message}
    messages, places = _in_front(messages, places, [image for image in given if image.kind not in held])
    columns = {}
    for kind in vision.kinds:
        column = [image for image in given if image.kind == kind]
        places_of_it = [place for of_message in places for place in of_message if place.kind == kind]
        if (open_places := sum(place.given is None for place in places_of_it)) != len(column):
            raise RowError(
                f"its text has {counted(open_places, TAGS[kind])}, and its column {counted(len(column), NAMES[kind])}"
            )
        columns[kind] = iter(column)
    images = [place.given or next(columns[place.kind]) for of_message in places for place in of_message]
    return [_with_number(*each) for each in zip(messages, places, strict=True)], tuple(
        _loaded(images, vision, directory)
    )


def keep_places(messages: Sequence[Message], images: tuple[bytes, ...]) -> tuple[list[Message], tuple[bytes, ...]]:
    """What an environment begins with, with the pictures of its row where it has their tags; without any tag it shows
    none of them.

    Raises:
        RowError: It has tags for more or fewer than there are.
    """
    found = list(map(kind_of, images))
    bare = [{key: value for key, value in message.items() if key != "images"} for message in messages]
    places = [_places(message, {"image", *found}) if images else [] for message in bare]
    kinds = [place.kind for of_message in places for place in of_message]
    if not kinds:
        return list(messages), ()
    if len(kinds) != len(images):
        has_videos = "video" in found
        tags = counted(len(kinds), "tag" if has_videos else TAGS["image"])
        pictures = counted(len(images), NAMES["video" if has_videos else "image"])
        raise RowError(f"it begins with {tags}, and its row has {pictures}")
    if kinds != found:
        raise RowError(f"it begins with {TAGS['image']} and {TAGS['video']} in another order than its row")
    return [_with_number(*each) for each in zip(messages, places, strict=True)], images


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
    vision = chat.vision
    shown = sum(message.get("images", 0) for message in messages)
    numbers = {kind: sum(message.get(COUNTS[kind], 0) for message in messages) for kind in COUNTS}
    numbers["image"] -= numbers["video"] + numbers["audio"]
    for kind, token_id in vision.placeholders.items():
        number = numbers[kind]
        placeholder = str(chat.tokenizer.convert_ids_to_tokens(token_id))
        found = rendered.text.count(placeholder)
        if number and not found:
            raise DataError(
                f"the chat template writes no {placeholder} where a message shows a {NAMES[kind]}, and the model "
                "reads one in its place: set a model.chat_template that does. A model whose processor writes it "
                "itself, as Gemma 3's, is trained on text alone"
            )
        if found != number:
            raise RowError(
                f"it has {counted(number, NAMES[kind])}, and the text that the chat template makes of it "
                f"{placeholder}, the place of one, {counted(found, 'time')}"
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
    return vision is not None and bool(vision.is_placeholder(token_ids[limit:]).any())


def _places(message: Message, kinds: Container[Kind]) -> list[Place]:
    """The places of a message, in their order; what an assistant writes is text, and so is the tag of what a model does
    not take."""
    if message["role"] == "assistant":
        return []
    tags = MEDIA_TAGS.findall(message["content"])
    given = message.get("images", [None] * len(tags))
    if not given:
        return []
    places = [Place(_KIND_OF_TAG[tag], image) for tag, image in zip(tags, given, strict=True)]
    return [place for place in places if place.kind in kinds]


def _in_front(
    messages: Sequence[Message], places: list[list[Place]], given: Sequence[GivenImage]
) -> tuple[Sequence[Message], list[list[Place]]]:
    """The messages with places for what is given at the beginning of the first question."""
    if not given:
        return messages, places
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("it has pictures, and no user message that could show them")
    tags = "".join(TAGS[image.kind] for image in given)
    shown = {**messages[first], "content": tags + messages[first]["content"]}
    added = [Place(image.kind, None) for image in given]
    return [*messages[:first], shown, *messages[first + 1 :]], [
        *places[:first],
        added + places[first],
        *places[first + 1 :],
    ]


def _with_number(message: Message, places: Sequence[Place]) -> Message:
    others = {key: value for key, value in message.items() if key != "images"}
    numbers = Counter(place.kind for place in places)
    numbers["image"] = len(places)
    return others | {name: numbers[kind] for kind, name in COUNTS.items() if numbers[kind]}


def _loaded(images: Sequence[GivenImage], vision: ImageProcessor, directory: Path) -> Iterator[bytes]:
    for image in images:
        try:
            data = vision.load(image.value, directory, image.kind)
            vision.num_tokens(data)
        except RowError as error:
            raise RowError(f"`{image.place}`: {error}") from error
        yield data
