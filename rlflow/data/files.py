"""Data files to numbered rows: JSON, JSONL, CSV, Parquet and text, plain or gzipped.

A row that cannot be read becomes ``Unreadable`` and the rest of the file is still read; a file that cannot be read
past some point is a DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError, nearest_beside
from rlflow.recipe.model_files import LFS_POINTER


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a row that could not be read."""

    reason: str


ROWS_KEYS = ("data", "rows", "examples", "instances")
"""Where a JSON object that is not a row itself has its rows."""
NumberedRows = Iterator[tuple[int, Any]]


def read_file(path: Path) -> NumberedRows:
    """Yields (row number from 1, value); the value is what the file holds there, or Unreadable.

    Raises:
        DataError: the file is of another kind, or damaged beyond a single row.
    """
    suffix = data_suffix(path.name)
    if suffix is None:
        known = ", ".join([*TEXT_READERS, ".parquet"])
        raise DataError(f"{path}: not a kind of file rlflow reads. Give one of {known}, or one of them with .gz.")
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fetch it again.") from error
    if data.startswith(LFS_POINTER):
        raise DataError(f"{path} is a pointer of Git LFS to the data, run `git lfs pull` there")
    if suffix == ".parquet":
        return _read_parquet(data, path)
    return _read_text(data, path, TEXT_READERS[suffix])


def data_suffix(name: str) -> str | None:
    """The suffix that says how a file is read (``.gz`` aside), or None."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix == ".parquet" or suffix in TEXT_READERS else None


def missing_file(path: Path) -> DataError:
    """The error for a file that is not there, with the names beside it that come near."""
    return DataError(f"{path}: no such file.{nearest_beside(path)}")


def _read_text(data: bytes, path: Path, reader: Callable[[str, Path], NumberedRows]) -> NumberedRows:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # The other rows are fine: a byte that is not UTF-8 becomes a lone surrogate, which gives its row away.
        return _without_escaped_bytes(reader(data.decode("utf-8-sig", errors="surrogateescape"), path))
    return reader(text, path)


def _without_escaped_bytes(rows: NumberedRows) -> NumberedRows:
    for number, value in rows:
        content = "" if isinstance(value, Unreadable) else json.dumps(value, ensure_ascii=False)
        escaped = re.search("[\udc80-\udcff]", content)
        yield number, Unreadable(f"invalid UTF-8 (byte 0x{ord(escaped[0]) - 0xDC00:02x})") if escaped else value


def _read_jsonl(text: str, path: Path) -> NumberedRows:
    lines = text.rstrip().split("\n")
    truncated = not text.endswith("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if len(lines) > 1:
                yield number, Unreadable("empty line")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            cut = " (the file ends here, without a newline: truncated?)" if truncated and number == len(lines) else ""
            value = Unreadable(f"not valid JSON: {error}{cut}")
        yield number, value


def _read_json(text: str, path: Path) -> NumberedRows:
    if not text.lstrip().startswith("["):
        return _read_json_objects(text, path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        end = "" if text.rstrip().endswith("]") else " The file is truncated: it has no closing bracket."
        raise DataError(
            f"{path}, row {sum(1 for _ in elements(text)) + 1}: not valid JSON ({error}).{end} "
            "A JSON array cannot be read past a damaged row: repair it, or store an object a line as .jsonl."
        ) from error
    return enumerate(values, 1)


def _read_json_objects(text: str, path: Path) -> NumberedRows:
    """Many .json files hold an object a line; others one object, which is a row or has the rows under a key."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _read_jsonl(text, path)
    lists = [value[key] for key in ROWS_KEYS if isinstance(value.get(key), list)] if isinstance(value, dict) else []
    return enumerate(lists[0] if len(lists) == 1 else [value], 1)


def elements(text: str) -> Iterator[Any]:
    """The elements of a JSON array up to the first that does not parse."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    while True:
        try:
            value, position = decoder.raw_decode(text, _skip_space(text, position))
        except (ValueError, RecursionError):
            return
        position = _skip_space(text, position)
        if text[position : position + 1] != ",":
            # What follows an element belongs to it: it is damaged, or the array ends.
            if text[position : position + 1] == "]":
                yield value
            return
        yield value
        position += 1


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _read_csv(text: str, path: Path) -> NumberedRows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}: the header is not valid CSV ({error}).") from error
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(twice)} more than once. Rename one of them.")
    number = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield number, Unreadable(f"not valid CSV: {error}")
            continue
        if not fields:
            continue
        number += 1
        if len(fields) == len(header):
            # A column without a name is the index that pandas writes.
            yield number, {name: field for name, field in zip(header, fields, strict=True) if name}
        else:
            yield number, Unreadable(f"has {len(fields)} fields, the header names {len(header)}")


def _read_lines(text: str, path: Path) -> NumberedRows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"text": line.removesuffix("\r")}


def _read_parquet(data: bytes, path: Path) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Fetch it again.") from error
    for index in range(table.num_rows):
        try:
            yield index + 1, {name: table.column(name)[index].as_py() for name in table.column_names}
        except UnicodeDecodeError as error:
            yield index + 1, Unreadable(f"invalid UTF-8 (byte 0x{error.object[error.start]:02x})")


TEXT_READERS: dict[str, Callable[[str, Path], NumberedRows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_lines,
}
