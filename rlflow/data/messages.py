"""What a column holds to chat messages: ``{"role": system|user|assistant|tool, "content": text, ...}``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from rlflow.data.calls import behind_thought, to_calls
from rlflow.data.errors import RowError
from rlflow.data.sources import kind
from rlflow.types import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT's and ms-swift's whose content is a call; of parts of a content, LLaMA-Factory's."""
PARTS = ("reasoning", "text", "tool_call")
"""In the order in which templates write them."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where a message may keep its thoughts, for the chat template."""
KEPT_KEYS = ("tool_call_id", "name", *REASONING_KEYS)
"""What a message may carry for the chat template, as text, beside ``tool_calls``."""
Kind = Literal["image", "video", "audio"]
"""Of what a model sees or hears in a row: a picture, a video or a recording."""
TAGS: dict[Kind, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""What stands in the text where one of them stands."""
MEDIA_TAGS = re.compile("|".join(map(re.escape, TAGS.values())))
KEYS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "url", "path", "base64", "bytes", "source"),
    "video": ("video", "video_url", "frames", "url", "path", "base64", "bytes"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path", "base64", "bytes", "array"),
}
"""Where a content part may hold one; a part that holds none shows the next of the row's column."""
TYPES: dict[str, Kind] = {name: kind for kind in KEYS for name in (kind, f"{kind}_url", f"input_{kind}")}
"""Types of content parts: Hugging Face's, and OpenAI's two."""
COUNTS: dict[Kind, str] = {"image": "images", "video": "videos", "audio": "audios"}
"""What a message says how many it shows of each under; ``images`` counts them all."""
WEIGHT_KEYS = ("loss", "weight", "loss_weight", "loss_scale")
"""What says whether a message is trained: true or false, or 1 or 0. It becomes ``loss``."""
WEIGHTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class GivenImage(NamedTuple):
    """A picture, a video or a recording as the row has it."""

    place: str
    """What messages call it."""
    value: Any
    kind: Kind = "image"


def to_messages(value: Any, column: str, *, may_be_empty: bool = False) -> list[Message]:
    """A list of messages, with role and content or ShareGPT's from and value; CSV holds the list as JSON text.

    Args:
        may_be_empty: Whether there may be messages without content: a conversation has them where somebody said
            nothing, and in data they are a mistake.

    Raises:
        RowError: it is not such a list, or a message has no known role or nothing in it.
    """
    value = from_json_text(value, column)
    if not isinstance(value, list) or not value:
        raise RowError(f"`{column}` is {kind(value) if value else 'empty'}, not a list of messages")
    messages: list[Message] = []
    for index, item in enumerate(value):
        message = to_message(item, place := f"{column}[{index}]", may_be_empty=may_be_empty)
        if messages and messages[-1]["role"] == "assistant" and item.get("from", item.get("role")) in CALLS:
            messages[-1] = _with_call(messages[-1], message, place)
        else:
            messages.append(message)
    if all(message["role"] == "system" and not message["content"].strip() for message in messages):
        raise RowError(f"`{column}` holds only an empty system message")
    return messages


def to_message(item: Any, place: str, *, may_be_empty: bool = False) -> Message:
    """One message, its role under our name and its content as text."""
    if not isinstance(item, dict):
        raise RowError(f"`{place}` is {kind(item)}, not a message")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    calls = item.get("tool_calls") or item.get("function_call")
    if role_key not in item or (content_key not in item and not calls):
        raise RowError(f"`{place}` lacks `{role_key if role_key not in item else content_key}`")
    role = item[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"`{place}` has the role {role!r}; roles are {', '.join(ROLES)}")
    content, place_of_content = item.get(content_key), f"{place}.{content_key}"
    message: Message = {"role": ROLES[role], "content": ""}
    message |= {key: item[key] for key in KEPT_KEYS if isinstance(item.get(key), str)}
    if role in CALLS:
        message["content"], content = behind_thought(content) if isinstance(content, str) else ("", content)
        message["tool_calls"] = to_calls(content, place)
    elif isinstance(content, list) and message["role"] == "assistant":
        message |= _answer_of_parts(content, place_of_content)
    elif message["role"] == "tool" and _is_data(content):
        message["content"] = json.dumps(content, ensure_ascii=False)
    else:
        message |= _content(content, place_of_content)
    if calls:
        message["tool_calls"] = to_calls(calls, f"{place}.tool_calls")
    for key in WEIGHT_KEYS:
        if item.get(key) is not None:
            message["loss"] = _is_trained(item[key], f"{place}.{key}")
    is_empty = not message["content"].strip() and "tool_calls" not in message
    if is_empty and message["role"] in ("user", "assistant") and not may_be_empty:
        raise RowError(f"`{place}` is empty")
    return message


def _with_call(message: Message, call: Message, place: str) -> Message:
    """A turn with the call that a message of its own adds to it: the assistant says and calls in one turn, and does
    all calls of a turn at once."""
    if message.get("loss", call.get("loss")) != call.get("loss", message.get("loss")):
        raise RowError(f"`{place}` is a call of the turn before it, and one of them is trained and the other is not")
    calls = [*message.get("tool_calls", ()), *call["tool_calls"]]
    content = message["content"] + call["content"]
    return {**message, "content": content, "tool_calls": calls} | ({"loss": call["loss"]} if "loss" in call else {})


def shown_tags(message: Message) -> list[str]:
    """The tags that stand in a message for what it shows; every other one is what somebody wrote."""
    number = message.get("images", 0)
    if not number:
        return []
    counts = {kind: message.get(name, 0) for kind, name in COUNTS.items()}
    counts["image"] -= counts["video"] + counts["audio"]
    return [tag for kind, tag in TAGS.items() if counts[kind]]


def parts_of(content: str, tags: Collection[str]) -> list[dict[str, str]]:
    """A content as parts of text and, where one of ``tags`` stands, of pictures and videos."""
    pieces = re.split(f"({'|'.join(map(re.escape, tags)) or '(?!)'})", content)
    parts: list[dict[str, str]] = []
    for piece in pieces:
        if piece in tags:
            # Qwen2-Audio's template looks for the key alone.
            parts.append({"type": "audio", "audio": ""} if piece == TAGS["audio"] else {"type": piece[1:-1]})
        elif piece or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


def pairs_to_messages(value: Any, column: str, user: str | int, assistant: str | int) -> list[Message]:
    """A list of exchanges, each an object or a pair with what was said under the keys ``user`` and ``assistant``."""
    value = from_json_text(value, column)
    if not isinstance(value, list):
        raise RowError(f"`{column}` is {kind(value)}, not a list of exchanges")
    messages = []
    for index, pair in enumerate(value):
        said: dict[str | int, Any] = (
            pair if isinstance(pair, dict) else dict(enumerate(pair)) if isinstance(pair, list) else {}
        )
        for role, key in (("user", user), ("assistant", assistant)):
            if key not in said:
                raise RowError(f"`{column}[{index}]` is not an exchange: it has no {key!r}")
            messages.append(to_message({"role": role, "content": said[key]}, f"{column}[{index}][{key!r}]"))
    return messages


def transcript_to_messages(text: str, column: str) -> list[Message]:
    r"""hh-rlhf's ``\n\nHuman: ...\n\nAssistant: ...``."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not turns:
        raise RowError(f"`{column}` does not begin with Human: or Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        to_message({"role": roles[speaker], "content": content.strip()}, f"{column}[{index}]")
        for index, (speaker, content) in enumerate(zip(turns[::2], turns[1::2], strict=True))
    ]


def from_json_text(value: Any, column: str) -> Any:
    """The list that a text column holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{column}` is not valid JSON: {error}") from None


def _content(value: Any, place: str) -> Message:
    """The text, and under ``images`` what content parts have to show in it, where some have."""
    if value is None:
        return {"content": ""}
    if isinstance(value, str):
        return {"content": value}
    if not isinstance(value, list):
        raise RowError(f"`{place}` is {kind(value)}, not text")
    texts: list[str] = []
    shown: list[GivenImage | None] = []
    shows_any = False
    for index, part in enumerate(value):
        place_of_part = f"{place}[{index}]"
        type_of_part = part.get("type") if isinstance(part, dict) else None
        if (shown_kind := TYPES.get(str(type_of_part))) is not None:
            shows_any = True
            texts.append(TAGS[shown_kind])
            held = [part[key] for key in KEYS[shown_kind] if part.get(key) is not None]
            # How a video is to be read stands beside it, and how fast a recording was sampled.
            is_picture = shown_kind == "image"
            value_of_part = held and held[0] if is_picture else {key: part[key] for key in part if key != "type"}
            shown.append(GivenImage(place_of_part, value_of_part, shown_kind) if held else None)
        else:
            texts.append(_part(part, place_of_part))
            shown += [None] * len(MEDIA_TAGS.findall(texts[-1]))
    return {"content": "".join(texts)} | ({"images": shown} if shows_any else {})


def _is_data(value: Any) -> bool:
    """Whether a tool's result is an object, or a list of what is no part of a content."""
    if isinstance(value, list):
        return not all(isinstance(part, dict) and "type" in part for part in value)
    return isinstance(value, dict)


def _answer_of_parts(parts: list[Any], place: str) -> Message:
    """What an assistant's message holds whose parts may be thoughts and calls, as LLaMA-Factory's."""
    by_type: dict[str, list[str]] = {name: [] for name in PARTS}
    last = 0
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PARTS:
            kind = "text"
        if PARTS.index(kind) < last:
            raise RowError(f"`{place}[{index}]`: {kind} comes behind {PARTS[last]}, where no chat template writes it")
        last = PARTS.index(kind)
        by_type[kind].append(_part(part, f"{place}[{index}]", kind))
    message: Message = {"content": "".join(by_type["text"])}
    if by_type["reasoning"]:
        message["reasoning_content"] = "".join(by_type["reasoning"])
    if by_type["tool_call"]:
        message["tool_calls"] = [call for text in by_type["tool_call"] for call in to_calls(text, place)]
    return message


def _part(part: Any, place: str, kind_of_part: str = "text") -> str:
    """The text of one content part, OpenAI's ``text`` or LLaMA-Factory's ``value``."""
    if not isinstance(part, dict) or "type" not in part:
        raise RowError(f"`{place}` is {kind(part)}, not a content part")
    if part["type"] != kind_of_part:
        raise RowError(f"`{place}` is of type {part['type']!r}; only text and a user's pictures are supported")
    texts = [part[key] for key in ("text", "value") if key in part and isinstance(part[key], str)]
    if not texts:
        raise RowError(f"`{place}` holds no text")
    return texts[0]


def _is_trained(value: Any, place: str) -> bool:
    word = str(value).lower()
    if not isinstance(value, bool | int | float | str) or word not in WEIGHTS:
        raise RowError(f"`{place}` is {value!r}: a message is trained (true, 1) or not (false, 0)")
    return WEIGHTS[word]
