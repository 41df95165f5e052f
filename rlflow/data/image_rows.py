"""Which picture or video stands where in a row.

The text of a message has ``<image>`` where a picture stands and ``<video>`` where a video does. The message says under
``images`` how many there are of both, and under ``videos`` how many of them are videos.
What stands there is the next of the column ``images`` or ``videos``, or what a content part holds; a row without any
place for its pictures, or for its videos, has them in front of its first question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, counted
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.messages import IMAGE_TAG, MEDIA_TAGS, VIDEO_TAG, GivenImage, from_json_text
from rlflow.data.video_archive import is_video
from rlflow.types import Message

IMAGE_COLUMNS = ("images", "image")
VIDEO_COLUMNS = ("videos", "video")
REJECTED_IMAGES = "rejected_images"
"""ms-swift's: the pictures of the losing conversation, where they are others."""


class Place(NamedTuple):
    """Where a picture or a video stands."""

    is_video: bool
    given: GivenImage | None
    """None where what stands there is the column's next."""


def take_images(columns: dict[str, Any], names: Sequence[str], *, is_video: bool = False) -> list[GivenImage]:
    """The pictures or videos of these columns, which are taken out: each of them, or one of them alone.

    Raises:
        RowError: More than one of the columns has some.
    """
    if not any(name in columns for name in names):
        return []
    values = {name: from_json_text(columns.pop(name), name) for name in names if name in columns}
    filled = {name: value for name, value in values.items() if value not in (None, "", [])}
    if len(filled) > 1:
        raise RowError(f"both `{'` and `'.join(filled)}` hold {'videos' if is_video else 'pictures'}: remove one")
    for name, value in filled.items():
        if not isinstance(value, list):
            return [GivenImage(name, value, is_video)]
        return [GivenImage(f"{name}[{index}]", item, is_video) for index, item in enumerate(value)]
    return []


def place_images(
    messages: Sequence[Message], given: Sequence[GivenImage], vision: ImageProcessor | None, directory: Path
) -> tuple[Sequence[Message], tuple[bytes, ...]]:
    """The messages, each with the number of its pictures and videos, and those in their order.

    Args:
        messages: As ``to_messages`` returns them.
        given: Of the row's columns.
        vision: Of the model; None of one that takes text alone.
        directory: What relative paths are relative to.

    Raises:
        RowError: The model takes none, one of them cannot be used, or there are more or fewer than places.
    """
    takes_videos = vision is not None and vision.takes_videos
    named = [*given, *(image for message in messages for image in message.get("images", ()) if image is not None)]
    if vision is None:
        if named or any("images" in message for message in messages):
            one = (
                f"`{named[0].place}` is a {_kind(named[0].is_video)}" if named else "its messages have places for some"
            )
            raise RowError(f"{one}, and the model takes text alone: train a vision-language model, or leave it out")
        return messages, ()
    if not takes_videos and (videos := [image for image in named if image.is_video]):
        raise RowError(
            f"`{videos[0].place}` is a video, and the model takes none: give the frames that matter as `images`, with "
            "an <image> for each"
        )
    places = [_places(message, takes_videos) for message in messages]
    held = {place.is_video for of_message in places for place in of_message}
    messages, places = _in_front(messages, places, [image for image in given if image.is_video not in held])
    columns = {}
    for of_videos in (False, True):
        column = [image for image in given if image.is_video == of_videos]
        places_of_it = [place for of_message in places for place in of_message if place.is_video == of_videos]
        if (open_places := sum(place.given is None for place in places_of_it)) != len(column):
            tag = VIDEO_TAG if of_videos else IMAGE_TAG
            raise RowError(
                f"its text has {counted(open_places, tag)}, and its column {_counted(len(column), of_videos)}"
            )
        columns[of_videos] = iter(column)
    images = [place.given or next(columns[place.is_video]) for of_message in places for place in of_message]
    return [_with_number(*each) for each in zip(messages, places, strict=True)], tuple(
        _loaded(images, vision, directory)
    )


def keep_places(messages: Sequence[Message], images: tuple[bytes, ...]) -> tuple[list[Message], tuple[bytes, ...]]:
    """What an environment begins with, with the pictures of its row where it has their tags; without any tag it shows
    none of them.

    Raises:
        RowError: It has tags for more or fewer than there are.
    """
    has_videos = any(map(is_video, images))
    bare = [{key: value for key, value in message.items() if key != "images"} for message in messages]
    places = [_places(message, has_videos) if images else [] for message in bare]
    kinds = [place.is_video for of_message in places for place in of_message]
    if not kinds:
        return list(messages), ()
    if len(kinds) != len(images):
        tags = counted(len(kinds), "tag" if has_videos else IMAGE_TAG)
        raise RowError(f"it begins with {tags}, and its row has {_counted(len(images), has_videos)}")
    if kinds != [is_video(image) for image in images]:
        raise RowError(f"it begins with {IMAGE_TAG} and {VIDEO_TAG} in another order than its row")
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
    num_videos = sum(message.get("videos", 0) for message in messages)
    for of_videos, number in ((False, shown - num_videos), (True, num_videos)):
        token_id = vision.video_token_id if of_videos else vision.image_token_id
        if token_id is None:
            continue
        placeholder = str(chat.tokenizer.convert_ids_to_tokens(token_id))
        found = rendered.text.count(placeholder)
        if number and not found:
            raise DataError(
                f"the chat template writes no {placeholder} where a message shows a {_kind(of_videos)}, and the model "
                "reads one in its place: set a model.chat_template that does. A model whose processor writes it "
                "itself, as Gemma 3's, is trained on text alone"
            )
        if found != number:
            raise RowError(
                f"it has {_counted(number, of_videos)}, and the text that the chat template makes of it {placeholder}, "
                f"the place of one, {counted(found, 'time')}"
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


def _places(message: Message, takes_videos: bool) -> list[Place]:
    """The places of a message, in their order; what an assistant writes is text, and so is ``<video>`` to a model that
    takes none."""
    if message["role"] == "assistant":
        return []
    tags = MEDIA_TAGS.findall(message["content"])
    given = message.get("images", [None] * len(tags))
    if not given:
        return []
    places = [Place(tag == VIDEO_TAG, image) for tag, image in zip(tags, given, strict=True)]
    return [place for place in places if takes_videos or not place.is_video]


def _in_front(
    messages: Sequence[Message], places: list[list[Place]], given: Sequence[GivenImage]
) -> tuple[Sequence[Message], list[list[Place]]]:
    """The messages with places for what is given at the beginning of the first question."""
    if not given:
        return messages, places
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("it has pictures, and no user message that could show them")
    tags = "".join(VIDEO_TAG if image.is_video else IMAGE_TAG for image in given)
    shown = {**messages[first], "content": tags + messages[first]["content"]}
    added = [Place(image.is_video, None) for image in given]
    return [*messages[:first], shown, *messages[first + 1 :]], [
        *places[:first],
        added + places[first],
        *places[first + 1 :],
    ]


def _with_number(message: Message, places: Sequence[Place]) -> Message:
    others = {key: value for key, value in message.items() if key != "images"}
    videos = sum(place.is_video for place in places)
    return others | ({"images": len(places)} if places else {}) | ({"videos": videos} if videos else {})


def _loaded(images: Sequence[GivenImage], vision: ImageProcessor, directory: Path) -> Iterator[bytes]:
    for image in images:
        try:
            load = vision.load_video if image.is_video else vision.load
            data = load(image.value, directory)
            vision.num_tokens(data)
        except RowError as error:
            raise RowError(f"`{image.place}`: {error}") from error
        yield data


def _kind(is_video: bool) -> str:
    return "video" if is_video else "picture"


def _counted(number: int, is_video: bool) -> str:
    return counted(number, _kind(is_video))
