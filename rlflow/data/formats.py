"""Rows of the formats people have to one Record each: messages, what is preferred, and the columns left for rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.data.calls import to_tools
from rlflow.data.errors import DataError, RowError, listing, spans
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import COLUMNS, REJECTED_IMAGES, place_images, take_images
from rlflow.data.logged import TOKENS, LoggedTokens
from rlflow.data.messages import (
    from_json_text,
    pairs_to_messages,
    to_message,
    to_messages,
    transcript_to_messages,
)
from rlflow.data.sources import Row, Table, kind
from rlflow.types import Message

ANSWERS = ("output", "response", "completion")


@dataclass(frozen=True, slots=True)
class Record:
    """A row, whatever its format was."""

    columns: dict[str, Any]
    """What the format did not use."""
    messages: Sequence[Message] = ()
    """The conversation, the answer included when the row has one; empty for plain text."""
    rejected: Sequence[Message] | None = None
    """The conversation with the answer that lost."""
    label: bool | None = None
    """Whether the answer is desirable (KTO)."""
    text: str | None = None
    """Plain text, which no chat template touches."""
    tools: list[Any] | None = None
    """Functions the assistant may call, for the chat template."""
    logged: LoggedTokens | None = None
    """The tokens of a rollout that was logged."""
    images: tuple[bytes, ...] = ()
    """Encoded pictures of ``messages``, in the order of their places."""
    rejected_images: tuple[bytes, ...] = ()
    """Of ``rejected``."""
    directory: Path = Path()
    """What paths in ``columns`` are relative to."""


def format_of(table: Table, *, judged: bool = False) -> str:
    """The format of a table by the columns that most of its rows have.

    Args:
        table: Some rows.
        judged: A column ``label`` says whether the answer is desirable; otherwise it is any other column.

    Raises:
        DataError: no format has these columns, or rows are of several formats.
    """
    counts = Counter(name for row in table.rows for name, value in row.columns.items() if value is not None)
    columns = {name for name, count in counts.items() if 2 * count > len(table.rows)}
    if (found := format_with(columns, judged=judged)) is not None:
        return found
    rows_of: dict[str | None, list[int]] = {}
    for row in table.rows:
        rows_of.setdefault(format_of_row(row, judged=judged), []).append(row.number)
    if len(rows_of) > 1:
        lines = [f"{name or 'no format that is known'}: row {spans(rows)}" for name, rows in rows_of.items()]
        raise DataError(
            f"{table.place}: its rows are of several formats, of which a file has one:{listing(lines)}\n"
            "Write a file for each, and name them all here, as in [{path: a.jsonl}, {path: b.jsonl}]."
        )
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for needed, name in DETECTION)
    raise DataError(
        f"{table.place}: no format has the columns {', '.join(sorted(columns)) or '(none)'}. Formats by their columns: "
        f"{known}. Name yours in this source's `columns`, e.g. columns: {{prompt: question, solution: answer}}."
    )


def format_with(columns: Set[str], *, judged: bool) -> str | None:
    """The first format that these columns are enough for."""
    names = (name for needed, name in DETECTION if needed <= columns and (judged or name != "kto"))
    return next(names, None)


def format_of_row(row: Row, *, judged: bool) -> str | None:
    """The format of one row by the columns that it has."""
    return format_with({name for name, value in row.columns.items() if value is not None}, judged=judged)


def to_record(row: Row, name: str, vision: ImageProcessor | None = None, directory: Path = Path()) -> Record:
    """One row of the format called ``name``.

    Args:
        row: As it was read.
        name: Of the format.
        vision: Of a model that takes pictures.
        directory: What paths of pictures are relative to.

    Raises:
        RowError: a column is missing, of the wrong type, or empty; or a picture cannot be used.
    """
    columns = dict(row.columns)
    logged = columns.pop(TOKENS, None)
    others = take_images(columns, COLUMNS["video"], "video") + take_images(columns, COLUMNS["audio"], "audio")
    given = take_images(columns, COLUMNS["image"], "image")
    given_rejected = (take_images(columns, [REJECTED_IMAGES], "image") or given) + others
    given += others
    system = _take_text(columns, "system") if _has(columns, "system") else None
    tools = to_tools(_take(columns, "tools")) if _has(columns, "tools") else None
    # What else a rollout's row has is for rewards, whatever it is called.
    record = FORMATS[name](columns) if logged is None else _rollout(columns)
    if record.text is not None and given:
        raise RowError(f"`{given[0].place}` is to be seen, and plain text has no place for one: give messages")
    messages, images = place_images(with_system(record.messages, system), given, vision, directory)
    rejected, rejected_images = None, ()
    if record.rejected is not None:
        losing = with_system(record.rejected, system)
        rejected, rejected_images = place_images(losing, given_rejected, vision, directory)
    # Not by `replace`, which takes a third of the time of a row.
    return Record(record.columns, messages, rejected, record.label, record.text, tools, logged, images, rejected_images)


def with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The messages behind a system message, unless there is none to put or they have their own."""
    if system is None or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(columns: dict[str, Any]) -> Record:
    return Record(columns, to_messages(_take(columns, "messages"), "messages"))


def _sharegpt(columns: dict[str, Any]) -> Record:
    return Record(columns, _question(columns, ("conversations", "conversation")))


def _instruction(columns: dict[str, Any]) -> Record:
    return Record(columns, _question(columns, ("instruction",)) + _optional_answer(columns, ANSWERS))


def _prompt(columns: dict[str, Any]) -> Record:
    return Record(columns, _question(columns, ("prompt", "query")) + _optional_answer(columns, ANSWERS[1:]))


def _preference(columns: dict[str, Any]) -> Record:
    if _has(columns, "messages") and not _has(columns, "chosen"):
        chosen = to_messages(_take(columns, "messages"), "messages")
        return Record(columns, chosen, rejected=_rejected_beside_messages(columns, chosen))
    names = ("chosen_messages", "rejected_messages") if "chosen_messages" in columns else ("chosen", "rejected")
    answers = [_take(columns, name) for name in names]
    prompt = _question(columns, QUESTIONS) if any(_has(columns, name) for name in QUESTIONS) else []
    chosen, rejected = (_completed(prompt, answer, name) for answer, name in zip(answers, names, strict=True))
    return Record(columns, chosen, rejected=rejected)


def _rollout(columns: dict[str, Any]) -> Record:
    label = _label(columns) if "label" in columns else None
    return Record(columns, to_messages(_take(columns, "messages"), "messages"), label=label)


def _kto(columns: dict[str, Any]) -> Record:
    label = _label(columns)
    messages = _question(columns, QUESTIONS) + _optional_answer(columns, ANSWERS)
    return Record(columns, messages, label=label)


def _label(columns: dict[str, Any]) -> bool:
    label = _take(columns, "label")
    if label is None:
        raise RowError("`label` is missing, or a value that the source's condition for it names")
    # CSV has no booleans.
    known = {"true": True, "false": False, "1": True, "0": False}
    word = str(label).lower()
    if not isinstance(label, bool | int | str) or word not in known:
        raise RowError(f"`label` is {label!r}, not true or false")
    return known[word]


def _text(columns: dict[str, Any]) -> Record:
    return Record(columns, text=_take_text(columns, "text"))


FORMATS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "prompt": _prompt,
    "preference": _preference,
    "kto": _kto,
    "text": _text,
}

DETECTION: tuple[tuple[set[str], str], ...] = (
    ({"chosen", "rejected"}, "preference"),
    ({"chosen_messages", "rejected_messages"}, "preference"),
    ({"messages", "rejected_response"}, "preference"),
    ({"messages", "rejected_messages"}, "preference"),
    ({"label"}, "kto"),
    ({"messages"}, "messages"),
    ({"conversations"}, "sharegpt"),
    ({"conversation"}, "sharegpt"),
    ({"instruction"}, "instruction"),
    ({"query"}, "prompt"),
    ({"prompt"}, "prompt"),
    ({"text"}, "text"),
)
"""Columns -> format; the first row whose columns are all there decides."""

QUESTIONS = ("prompt", "query", "instruction", "conversations", "conversation", "messages")


def _question(columns: dict[str, Any], names: Sequence[str]) -> list[Message]:
    """The conversation so far, from the first of ``names`` that is there."""
    named = [name for name in names if _has(columns, name)] + [name for name in names if name in columns]
    if not named:
        raise RowError(f"`{'` or `'.join(names)}` is missing (it has {', '.join(columns) or 'no other columns'})")
    name = named[0]
    value = columns.pop(name)
    if name in ("conversations", "conversation"):
        return _conversation(value, name)
    if name == "messages":
        return to_messages(value, name)
    history = pairs_to_messages(columns.pop("history"), "history", 0, 1) if _has(columns, "history") else []
    if isinstance(value, list) and value and name != "instruction":
        return history + to_messages(value, name)
    question = _text_of(value, name)
    about = next((column for column in ("input", "context") if _has(columns, column)), None)
    if name == "instruction" and about is not None:
        question = f"{question}\n{_take_text(columns, about)}"
    return [*history, {"role": "user", "content": question}]


def _conversation(value: Any, name: str) -> list[Message]:
    value = from_json_text(value, name)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "human" in value[0]:
        return pairs_to_messages(value, name, "human", "assistant")
    return to_messages(value, name)


def _optional_answer(columns: dict[str, Any], names: Sequence[str]) -> list[Message]:
    for name in names:
        if _has(columns, name):
            return _answer(columns.pop(name), name)
    return []


def _answer(value: Any, name: str) -> list[Message]:
    """An answer as text, one message, or messages."""
    if isinstance(value, list):
        return to_messages(value, name)
    if isinstance(value, dict):
        return [to_message(value, name)]
    return [{"role": "assistant", "content": _text_of(value, name)}]


def _completed(prompt: list[Message], answer: Any, name: str) -> list[Message]:
    """A prompt with its answer; an answer that begins with the prompt stands for the whole conversation."""
    if not prompt and isinstance(answer, str):
        return transcript_to_messages(answer, name)
    messages = _answer(answer, name)
    return messages if messages[0]["role"] != "assistant" else prompt + messages


def _rejected_beside_messages(columns: dict[str, Any], chosen: list[Message]) -> list[Message]:
    """ms-swift's forms: the losing last turn, or the whole losing conversation."""
    if _has(columns, "rejected_messages"):
        system = chosen[0]["content"] if chosen[0]["role"] == "system" else None
        rejected = to_messages(_take(columns, "rejected_messages"), "rejected_messages")
        return list(with_system(rejected, system))
    if chosen[-1]["role"] != "assistant":
        raise RowError("`messages` does not end with the assistant's chosen answer")
    return [*chosen[:-1], *_answer(_take(columns, "rejected_response"), "rejected_response")]


def _has(columns: dict[str, Any], name: str) -> bool:
    """Whether an optional column is given: CSV and Parquet write what is absent as empty."""
    return name in columns and columns[name] not in (None, "", [])


def _take(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise RowError(f"`{name}` is missing (it has {', '.join(columns) or 'no other columns'})")
    return columns.pop(name)


def _take_text(columns: dict[str, Any], name: str) -> str:
    return _text_of(_take(columns, name), name)


def _text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, not text")
    if not value.strip():
        raise RowError(f"`{name}` is empty")
    return value
