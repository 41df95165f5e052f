"""Stored rollouts as rows to train on: rejection sampling, and pairs of better and worse."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.kept_answers import chat_row, pair_row
from rlflow.text_files import write_text
from rlflow.tracking.rollouts import RolloutRecord


def export_chat(records: Sequence[RolloutRecord], path: Path) -> None:
    """Writes conversations as JSONL in the chat format that SFT reads: the prompt's messages, and the completion as the
    assistant's, what the prompt had opened (``<think>``) in front of it; of an episode all turns, calls and tools.

    Raises:
        DataError: The file cannot be written.
    """
    _write([chat_row(record) for record in records], path)


def export_pairs(records: Sequence[RolloutRecord], path: Path) -> int:
    """Writes the best and the worst rollout of every group as a preference pair that DPO reads, where their rewards
    differ. Those that were cut or not scored are in none. Returns how many there are.

    Raises:
        DataError: The file cannot be written.
    """
    groups: defaultdict[tuple[Any, ...], list[RolloutRecord]] = defaultdict(list)
    for record in records:
        if record.finish_reason != "length" and not math.isnan(record.reward):
            groups[record.step, record.prompt_id, record.epoch].append(record)
    rows = []
    for group in groups.values():
        worst, best = (pick(group, key=lambda record: record.reward) for pick in (min, max))
        if best.reward > worst.reward:
            rows.append(pair_row(best, worst))
    _write(rows, path)
    return len(rows)


def _write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another file") from error
