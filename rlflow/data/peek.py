"""What can be told of a data source before it is loaded: its splits, its columns, its generator's arguments."""

from __future__ import annotations

import ast
import gzip
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError, nearest
from rlflow.data.files import TEXT_READERS, Unreadable, data_suffix, elements
from rlflow.data.generated import CHECKS, GENERATORS
from rlflow.data.logged import logged_files
from rlflow.recipe.data_blocks import SourceBlock

PEEKED_CHARACTERS = 1 << 20
"""How much of a file is looked at."""
_KINDS = inspect.Parameter

Found = Iterator[tuple[str, str]]
"""(dotted key below the source, what is wrong with its value and what to do)."""


def problems(source: SourceBlock) -> Found:
    """The keys of a source that its data does not bear out.

    Nothing is executed, no hub is asked, and what is not there at all is not looked at. A single file may stand in for
    a dataset: what the recipe says of that one's splits and subsets is no fault.
    """
    if source.generator is not None:
        yield from _in_args(source.generator, source.args)
        return
    path = Path(os.path.expanduser(source.path or ""))
    if logged_files(path):
        return
    if path.is_dir():
        yield from _in_directory(path, source)
    elif path.is_file():
        columns = _columns(path) if source.columns else None
        for ours, theirs in source.columns.items():
            if columns and theirs not in columns:
                listed = ", ".join(columns)
                yield f"columns.{ours}", f"{path} has no column {theirs}; it has {listed}.{nearest(theirs, columns)}"


def _in_args(spec: str, args: dict[str, Any]) -> Found:
    signature = inspect.signature(GENERATORS[spec]) if spec in GENERATORS else _signature_in_file(spec)
    if signature is None:
        return
    try:
        bound = signature.bind(**args)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        wrong = next((name for name in args if name not in signature.parameters), "")
        yield "args", f"{spec}: {error}; its args are {takes}.{nearest(wrong, signature.parameters) if wrong else ''}"
        return
    if spec in CHECKS:
        bound.apply_defaults()
        try:
            CHECKS[spec](**bound.arguments)
        except (DataError, TypeError) as error:
            yield "args", str(error)


def _signature_in_file(spec: str) -> inspect.Signature | None:
    """Of ``file.py:function``, without running the file; None where it is no plain function of it."""
    file, _, name = spec.rpartition(":")
    try:
        module = ast.parse(Path(os.path.expanduser(file)).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found or found[-1].decorator_list:
        return None
    given = found[-1].args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    kinds = [_KINDS.POSITIONAL_ONLY] * len(given.posonlyargs) + [_KINDS.POSITIONAL_OR_KEYWORD] * len(given.args)
    parameters = [_parameter(*each) for each in zip(positional, kinds, defaults, strict=True)]
    parameters += [_parameter(given.vararg, _KINDS.VAR_POSITIONAL, None)] if given.vararg else []
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    parameters += [_parameter(argument, _KINDS.KEYWORD_ONLY, default) for argument, default in keywords]
    parameters += [_parameter(given.kwarg, _KINDS.VAR_KEYWORD, None)] if given.kwarg else []
    return inspect.Signature(parameters)


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    return inspect.Parameter(argument.arg, kind, default=inspect.Parameter.empty if default is None else default)


def _in_directory(path: Path, source: SourceBlock) -> Found:
    import datasets
    from datasets.exceptions import DatasetsError

    def splits(**where: Any) -> list[str]:
        files = datasets.load_dataset_builder(str(path), **where).config.data_files
        return [str(name) for name in files or ()]

    failures = (OSError, ValueError, RuntimeError, DatasetsError)
    found: list[str] = []
    try:
        found = splits(name=source.subset)
    except failures as error:
        try:
            found = splits(data_dir=source.subset) if source.subset is not None else []
        except failures:
            yield "subset", f"{path} has no configuration and no folder {source.subset}: {error}"
            return
    asked = [part.partition("[")[0].strip() for part in source.split.split("+")]
    for split in asked:
        if found and split not in (*found, "all"):
            yield "split", f"{path} has no split {split}; it has {', '.join(found)}.{nearest(split, found)}"


def _columns(path: Path) -> list[str]:
    """The columns of the first rows of a file; none where they cannot be told."""
    suffix = data_suffix(path.name)
    is_packed = path.suffix.lower() == ".gz"
    if suffix == ".parquet":
        return [] if is_packed else _parquet_columns(path)
    if suffix is None:
        return []
    opened: Callable[..., Any] = gzip.open if is_packed else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            text = file.read(PEEKED_CHARACTERS)
    except (OSError, EOFError):
        return []
    whole = len(text) < PEEKED_CHARACTERS
    if suffix == ".json" and text.lstrip().startswith("["):
        rows = list(elements(text))
    else:
        text = text if whole else text[: text.rfind("\n") + 1]
        rows = [row for _, row in TEXT_READERS[suffix](text, path) if not isinstance(row, Unreadable)]
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError):
        return []
