"""Stored rollouts as rows to train on: rejection sampling, and pairs of better and worse."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.images import data_uri
from rlflow.data.logged import conversation_of
from rlflow.tracking.rollouts import RolloutRecord


def export_chat(records: Sequence[RolloutRecord], path: Path) -> None:
    """Writes conversations as JSONL in the chat format that SFT reads: the prompt's messages, and the completion as the
    assistant's, what the prompt had opened (``<think>``) in front of it; of an episode all turns, calls and tools.

    Raises:
        DataError: The file cannot be written.
    """
    rows = []
    for record in records:
        row: dict[str, Any] = {"messages": conversation_of(record), "prompt_id": record.prompt_id, "step": record.step}
        row |= {"tools": record.tools} if record.tools else {}
        row |= _images_of(record)
        rows.append(row | {"reward": None if math.isnan(record.reward) else record.reward})
    _write(rows, path)


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
            rows.append(
                {
                    "chosen_messages": conversation_of(best),
                    "rejected_messages": conversation_of(worst),
                    **({"tools": best.tools} if best.tools else {}),
                    **_images_of(best),
                    **{"prompt_id": best.prompt_id, "step": best.step},
                    **{"chosen_reward": best.reward, "rejected_reward": worst.reward},
                }
            )
    _write(rows, path)
    return len(rows)


def _images_of(record: RolloutRecord) -> dict[str, Any]:
    """The column of its pictures, each as a data URI."""
    return {"images": [data_uri(image) for image in record.images]} if record.images else {}


def _write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another file") from error
