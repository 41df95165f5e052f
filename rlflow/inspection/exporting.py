"""Stored rollouts as rows to train on: rejection sampling."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.tracking.rollouts import RolloutRecord


def export_chat(records: Sequence[RolloutRecord], path: Path) -> None:
    """Writes conversations as JSONL in the chat format that SFT reads: the prompt's messages, and the completion as the
    assistant's, what the prompt had opened (``<think>``) in front of it; of an episode all turns, calls and tools.

    Raises:
        DataError: The file cannot be written.
    """
    lines = []
    for record in records:
        row = {"messages": _messages(record), "prompt_id": record.prompt_id, "step": record.step}
        row |= {"tools": record.tools} if record.tools else {}
        lines.append(json.dumps(row | {"reward": None if math.isnan(record.reward) else record.reward}))
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another file") from error


def _messages(record: RolloutRecord) -> list[dict[str, Any]]:
    if record.episode is not None:
        return [*(record.episode.prompt or record.messages), *record.episode.messages]
    return [*record.messages, {"role": "assistant", "content": record.opened + record.completion}]
