"""A SourceBlock to the rows of one file, hub dataset or generator, each checked to be text that can be trained on."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlflow.data.errors import BadRow, DataError, nearest
from rlflow.data.files import Unreadable, data_suffix, missing_file, read_file
from rlflow.data.generated import GENERATORS
from rlflow.data.logged import logged_files, read_logged
from rlflow.recipe.data_blocks import SourceBlock

KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


CONVERSATION_COLUMNS = {
    *("messages", "conversations", "conversation", "prompt", "query", "history", "tools"),
    *("completion", "response", "output", "chosen", "rejected"),
    *("chosen_messages", "rejected_messages", "rejected_response"),
}
"""What may hold objects for a chat template."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, its columns under our names."""

    number: int
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One source."""

    place: str
    """What messages call it: a path, a hub id, a generator."""
    stem: str
    """What row ids begin with."""
    rows: list[Row]
    bad: list[BadRow]
    directory: Path = Path()
    """What paths in its rows are relative to: its file's, or the working directory."""


def read_table(source: SourceBlock) -> Table:
    """Reads a source, renames its columns and sets the rows aside that are not sound text.

    Raises:
        DataError: there is no such source, it has no rows, or a column that ``columns`` names is nowhere in it.
    """
    place, stem, values = _open(source)
    is_arrow = _is_arrow(source)
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, value in values:
        reason = _problem(value)
        if reason:
            bad.append(BadRow(place, number, reason))
        else:
            rows.append(Row(number, value))
    if not rows and not bad:
        raise DataError(f"{place}: holds no rows.")
    rows = _rename(rows, bad, source.columns, place)
    if is_arrow:
        rows = [replace(row, columns=_without_filled_nulls(row.columns)) for row in rows]
    if not (source.path and logged_files(Path(os.path.expanduser(source.path)))):
        rows = rows if source.where is None else rows_where(rows, source.where, place)
        rows = rows if source.label is None else rows_with_labels(rows, source.label, place)
    directory = Path() if source.path is None else _directory_of(Path(os.path.expanduser(source.path)))
    kept = _without_repeated_ids(rows, bad, place)
    return Table(place, stem, kept, sorted(bad, key=lambda row: row.row), directory)


def rows_where(rows: Sequence[Row], where: str, place: str) -> list[Row]:
    """The rows that fulfil a condition on their columns; `reward/<fn>` is in the column ``rewards``.

    Raises:
        DataError: It is none, names what no row has, or no row fulfils it.
    """
    # It loads pyarrow.
    from rlflow.tracking.filters import filter_rows

    try:
        chosen = filter_rows([row.columns for row in rows], where)
    except DataError as error:
        raise DataError(f"{place}: where: {error}") from error
    if not chosen:
        raise DataError(f"{place}: none of its {len(rows)} rows fulfils `{where}`.")
    return [rows[index] for index in chosen]


def rows_with_labels(rows: Sequence[Row], label: str, place: str) -> list[Row]:
    """The rows with a column ``label``: whether they fulfil a condition; null where a value that it names is missing.

    Raises:
        DataError: The condition is none, or names what no row has.
    """
    from rlflow.tracking.filters import judge_rows

    try:
        labels = judge_rows([row.columns for row in rows], label)
    except DataError as error:
        raise DataError(f"{place}: label: {error}") from error
    return [replace(row, columns={**row.columns, "label": is_so}) for row, is_so in zip(rows, labels, strict=True)]


def kind(value: Any) -> str:
    """What a value is, in a user's words."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def _is_arrow(source: SourceBlock) -> bool:
    """Whether its objects have the keys of all rows' objects."""
    path = source.path
    if path is None or logged_files(Path(os.path.expanduser(path))):
        return False
    return data_suffix(path) in (None, ".parquet")


def _open(source: SourceBlock) -> tuple[str, str, Iterable[tuple[int, Any]]]:
    if source.generator is not None and source.path is None:
        name = source.generator.rpartition(":")[2]
        return source.generator, name, enumerate(_generate(source.generator, source.args), 1)
    if source.path is None or source.generator is not None:
        raise DataError("a data source has either `path` or `generator`.")
    path = Path(os.path.expanduser(source.path))
    if files := logged_files(path):
        return str(path), path.name.split(".")[0], read_logged(files, source.where, source.label)
    if path.is_file():
        return str(path), path.name.split(".")[0], read_file(path)
    if not path.is_dir() and (data_suffix(path.name) or source.path.startswith((".", "/", "~"))):
        raise missing_file(path)
    return source.path, path.name, enumerate(_load_dataset(source.path, source), 1)


def _directory_of(path: Path) -> Path:
    """A file's folder, a folder itself; the working directory for what is on a hub."""
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _load_dataset(path: str, source: SourceBlock) -> Iterable[Any]:
    """Rows of a hub dataset, or of a local directory of data files. A subset is a configuration, or else a folder."""
    import datasets
    from datasets.exceptions import DatasetsError

    failures = (OSError, ValueError, RuntimeError, DatasetsError)
    try:
        with _without_retries():
            return datasets.load_dataset(path, name=source.subset, split=source.split)
    except failures as error:
        if isinstance(error, ValueError) and source.subset is not None:
            with contextlib.suppress(*failures):
                return datasets.load_dataset(path, data_dir=source.subset, split=source.split)
        place = "It is a directory" if Path(path).is_dir() else "It is no local file, so the Hugging Face hub was asked"
        raise DataError(
            f"{path} (subset {source.subset}, split {source.split}): cannot be loaded: {' '.join(str(error).split())}. "
            f"{place}. Check id, subset and split, or give the path of a local file."
        ) from error


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """Within, the hub's client prints no line for each of its tries: the error says what came of them."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _generate(spec: str, args: dict[str, Any]) -> Iterator[Any]:
    function = GENERATORS[spec] if spec in GENERATORS else _load_function(spec)
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        takes = ", ".join(inspect.signature(function).parameters)
        raise DataError(f"generator {spec}: {error}. Its args are: {takes}.") from error
    try:
        yield from function(**args)
    except DataError:
        raise
    except Exception as error:
        # The user's code: whatever it raises is about the data.
        raise DataError(f"generator {spec} raised {type(error).__name__}: {error}") from error


def _load_function(spec: str) -> Callable[..., Iterable[Any]]:
    file, colon, name = spec.rpartition(":")
    if not colon:
        known = ", ".join(GENERATORS)
        raise DataError(
            f"no generator is called {spec}; there are {known}, or give `file.py:function`.{nearest(spec, GENERATORS)}"
        )
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise missing_file(path)
    module_spec = importlib.util.spec_from_file_location(f"rlflow_generator_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise DataError(f"generator {spec}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"generator {spec}: importing {path} raised {type(error).__name__}: {error}") from error
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    if name not in functions:
        raise DataError(f"generator {spec}: {path} has no function {name}.{nearest(name, functions)}")
    return functions[name]


def _problem(value: Any) -> str | None:
    """Why a value is not a row, or None."""
    if isinstance(value, Unreadable):
        return value.reason
    if not isinstance(value, dict):
        return f"is {kind(value)}, not an object"
    if not value:
        return "is empty"
    for column, content in value.items():
        if not isinstance(column, str):
            return f"has a column whose name is {kind(column)}, not text"
        for text in (column, content) if isinstance(content, str) else (column, *_texts(content)):
            if "\0" in text:
                return f"`{_printable(column)}` holds a NUL character"
            if text.isascii():
                continue
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"`{_printable(column)}` holds a lone surrogate (U+{ord(text[error.start]):04X})"
    return None


def _printable(text: str) -> str:
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _texts(value: Any) -> Iterator[str]:
    """Every string within a value; a loop, because a hostile file nests deeper than Python recurses."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _rename(rows: list[Row], bad: list[BadRow], columns: dict[str, str], place: str) -> list[Row]:
    if not columns:
        return rows
    present = dict.fromkeys(name for row in rows for name in row.columns)
    for ours, theirs in columns.items():
        if rows and theirs not in present:
            raise DataError(
                f"{place}: has no column `{theirs}` (columns: {{{ours}: {theirs}}}). "
                f"Its columns are {', '.join(present)}.{nearest(theirs, present)}"
            )
    renamed = []
    for row in rows:
        missing = [theirs for theirs in columns.values() if theirs not in row.columns]
        if missing:
            bad.append(BadRow(place, row.number, f"`{missing[0]}` is missing"))
            continue
        kept = {
            name: value for name, value in row.columns.items() if name not in columns and name not in columns.values()
        }
        kept |= {ours: row.columns[theirs] for ours, theirs in columns.items()}
        renamed.append(Row(row.number, kept))
    return renamed


def _without_filled_nulls(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of a conversation without the null keys that Arrow fills in: its objects have the keys of all rows'
    objects, so a parameter of another row's tool would come into every prompt."""
    return {name: _without_nulls(value) if name in CONVERSATION_COLUMNS else value for name, value in columns.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _without_repeated_ids(rows: Sequence[Row], bad: list[BadRow], place: str) -> list[Row]:
    """An ``id`` column that repeats is a row that came in twice."""
    first: dict[Any, int] = {}
    kept = []
    for row in rows:
        name = row.columns.get("id")
        if isinstance(name, str | int) and first.setdefault(name, row.number) != row.number:
            bad.append(BadRow(place, row.number, f"`id` {name!r} is also that of row {first[name]}"))
        else:
            kept.append(row)
    return kept
