"""Rows that environments of other projects bring with them: generators, and what their adapters share with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from rlflow.data.errors import DataError
from rlflow.types import Message

OF_ROWS = ("answer", "info", "example_id", "task")
"""What rows of verifiers' have beside a prompt."""


def reasoning_gym(
    task: str, size: int = 500, seed: int = 0, config: Mapping[str, Any] | None = None, instruction: str = ""
) -> list[dict[str, Any]]:
    """The questions of a task.

    Args:
        instruction: Put behind every question, e.g. how to give the answer.
    """
    dataset = dataset_of(task, seed, size, tuple(sorted((config or {}).items())))
    return [
        {
            "prompt": "\n".join(filter(None, [entry["question"], instruction])),
            "answer": str(entry["answer"]),
            **{"index": index, "seed": seed, "size": size},
        }
        for index, entry in enumerate(dataset[i] for i in range(size))
    ]


@cache
def dataset_of(task: str, seed: int, size: int, config: tuple[tuple[str, Any], ...]) -> Any:
    with _needs("reasoning-gym"):
        create_dataset = import_module("reasoning_gym").create_dataset
    return create_dataset(task, seed=seed, size=size, **dict(config))


def verifiers(id: str, size: int = -1, **args: Any) -> list[dict[str, Any]]:
    """The environment's own training set.

    Args:
        size: So many rows; all where it is -1.
    """
    made = environment_of(id, json.dumps(args, sort_keys=True))
    if not is_classic():
        return _tasks(made, size)
    return [
        {
            "messages": plain(normalized(row["prompt"])),
            **{name: row[name] for name in OF_ROWS if row.get(name) is not None},
        }
        for row in made.get_dataset(n=size)
    ]


@cache
def environment_of(id: str, args: str) -> Any:
    """Loaded once a process: it may read a data set."""
    with _needs("verifiers"):
        verifiers = import_module("verifiers")
        if is_classic():
            return verifiers.load_environment(id, **json.loads(args))
        loaders = import_module("verifiers.v1.utils.loaders")
        given = json.loads(args)
        of_environment = {"id": given.pop("env", ""), "taskset": {"id": id, **given}}
        return loaders.load_environment(loaders.resolve_env_config(of_environment))


def is_classic() -> bool:
    """Whether verifiers has the interface of its versions 0.1."""
    return hasattr(import_module("verifiers"), "load_environment")


def opening_of(data: Any) -> list[Any]:
    """What a task of verifiers' begins with, as its messages; text is a user's."""
    types = import_module("verifiers.v1.types")
    system = [] if data.system_prompt is None else [types.SystemMessage(content=data.system_prompt)]
    prompt = [types.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt or []
    return [*system, *prompt]


def _tasks(made: Any, size: int) -> list[dict[str, Any]]:
    """Rows of a taskset: the prompt, and the task as it is."""
    if size < 0 and not made.taskset.bounded:
        raise DataError("the taskset is without end: give size in args")
    return [
        {
            "messages": plain(opening_of(task.data)) or [{"role": "user", "content": "Begin."}],
            "task": task.data.model_dump(mode="json"),
        }
        for task in (made.taskset if size < 0 else made.taskset.take(size))
    ]


def normalized(messages: Sequence[Any]) -> Sequence[Any]:
    normalize_messages = import_module("verifiers.utils.message_utils").normalize_messages
    return normalize_messages(list(messages), field_name="messages")


def plain(messages: Sequence[Any]) -> list[Message]:
    """Messages of verifiers' as dictionaries, calls in OpenAI's form."""
    dicts = (message if isinstance(message, dict) else message.model_dump(exclude_none=True) for message in messages)
    return [_plain(message) for message in dicts]


def _plain(message: Mapping[str, Any]) -> Message:
    plain_message: Message = {**message, "content": message.get("content") or ""}
    if calls := plain_message.pop("tool_calls", None):
        plain_message["tool_calls"] = [
            call if "function" in call else {"type": "function", "id": call["id"], "function": _function(call)}
            for call in calls
        ]
    return plain_message


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}


@contextmanager
def _needs(package: str) -> Iterator[None]:
    """Within it the package is imported.

    Raises:
        DataError: It, or what it needs, is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise DataError(f"this environment needs {package} ({error}): pip install {package!r}") from error
