"""Reads what an offline wandb run has on disk: LevelDB's log format behind a header of seven bytes, protobuf within."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pending = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        pending += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (FULL, LAST):
            yield Record.FromString(pending)
            pending = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Every row that was logged; what is nested as ``key.inner``."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
            rows.append({key: json.loads(value) for key, value in items})
    return rows


def runs(path: Path) -> list[Any]:
    """What was said of the run itself."""
    return [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
