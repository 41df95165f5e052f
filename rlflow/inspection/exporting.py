"""Stored rollouts as rows to train on: rejection sampling."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rlflow.data.errors import DataError
from rlflow.tracking.rollouts import RolloutRecord


def export_chat(records: Sequence[RolloutRecord], path: Path) -> None:
    """Writes conversations as JSONL in the chat format that SFT reads: the prompt's messages, and the completion as the
    assistant's, what the prompt had opened (``<think>``) in front of it.

    Raises:
        DataError: The file cannot be written.
    """
    lines = []
    for record in records:
        answer = {"role": "assistant", "content": record.opened + record.completion}
        row = {"messages": [*record.messages, answer], "prompt_id": record.prompt_id, "step": record.step}
        lines.append(json.dumps(row | {"reward": None if math.isnan(record.reward) else record.reward}))
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another file") from error
