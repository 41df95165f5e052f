"""What a row's ``label`` says: class names and ids to what a head should put out, and the names that data has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.data.errors import DataError, RowError, nearest
from rlflow.data.messages import from_json_text
from rlflow.data.sources import kind, read_table
from rlflow.recipe import ClassificationBlock, Recipe, SourceBlock
from rlflow.recipe.sequence_blocks import ClassesBlock, RegressionBlock

LABELS = ("label", "labels")
"""The column that holds it."""
_MOST_CLASSES = 10_000
"""More names than this are texts, not classes."""


def with_labels(recipe: Recipe) -> Recipe:
    """The recipe with the names of its classes, from the rows of ``data.train`` where it does not say them.

    Raises:
        DataError: The rows name none, or a source cannot be read.
    """
    algorithm = recipe.algorithm
    if not isinstance(algorithm, ClassificationBlock) or not isinstance(algorithm.classification, ClassesBlock):
        return recipe
    if algorithm.classification.labels is not None:
        return recipe
    problem = algorithm.classification.model_copy(update={"labels": labels_in(recipe.data.train)})
    return recipe.model_copy(update={"algorithm": algorithm.model_copy(update={"classification": problem})})


def labels_in(sources: SourceBlock | Sequence[SourceBlock]) -> list[str]:
    """The classes that rows name, sorted; of whole numbers "0", "1" and so on up to the largest.

    Raises:
        DataError: There are none, names and numbers are mixed, or a source cannot be read.
    """
    given: dict[str | int, str] = {}
    others = ""
    for source in [sources] if isinstance(sources, SourceBlock) else sources:
        table = read_table(source)
        for row in table.rows:
            place = f"{table.place}, row {row.number}"
            try:
                for name in _classes(label_of(row.columns)):
                    given.setdefault(name, place)
            except RowError as error:
                # Where there are classes all the same, the loader says it of each row.
                others = others or f" {place}: {error}."
    numbers = [name for name in given if isinstance(name, int)]
    names = sorted(name for name in given if isinstance(name, str))
    remedy = "Name the classes in algorithm.classification.labels."
    if names and numbers:
        raise DataError(f"some rows name their class ({names[0]!r}), others give a number ({numbers[0]}). {remedy}")
    if not given:
        raise DataError(
            f"no row names a class: `label` is to be a name, a whole number, or a list of these.{others} {remedy}"
        )
    if numbers and min(numbers) < 0:
        least = min(numbers)
        raise DataError(f"{given[least]}: it has the class {least}, and ids count from 0. {remedy}")
    count = max(numbers) + 1 if numbers else len(names)
    if count > _MOST_CLASSES:
        raise DataError(f"the rows have {count:,} classes. {remedy}")
    if count < 2:
        one = (names or numbers)[0]
        raise DataError(f"all rows have one class, {one!r}: there is nothing to tell apart.{others} {remedy}")
    return [str(number) for number in range(count)] if numbers else names


def label_of(columns: Mapping[str, Any]) -> Any:
    """
    Raises:
        RowError: There is none.
    """
    for name in LABELS:
        if name in columns and columns[name] is not None and columns[name] != "":
            return from_json_text(columns[name], name) if _is_list_text(columns[name]) else columns[name]
    raise RowError(f"it has no `label` (its columns are {', '.join(columns)})")


def targets_of(label: Any, problem: ClassesBlock | RegressionBlock) -> np.ndarray:
    """What the head should put out: [1], the id of a class; [K], 1 for each class that is named; or [K] numbers.

    Raises:
        RowError: The label is of another kind, out of range, or unknown.
    """
    if isinstance(problem, RegressionBlock):
        values = label if isinstance(label, list) else [label]
        if len(values) != problem.targets:
            raise RowError(
                f"`label` has {len(values)} numbers, and algorithm.classification.targets is {problem.targets}"
            )
        return np.array([number_of(value) for value in values], dtype=np.float32)
    assert problem.labels is not None
    ids = [_id_of(name, problem.labels) for name in _classes(label)]
    if problem.problem == "multi_label":
        chosen = np.zeros(len(problem.labels), dtype=np.float32)
        chosen[ids] = 1.0
        return chosen
    if isinstance(label, list):
        reason = f"`label` is a list of {len(label)}, and a text has one class: set classification.problem: multi_label"
        raise RowError(reason)
    return np.array(ids, dtype=np.float32)


def number_of(value: Any, name: str = "label") -> float:
    """
    Raises:
        RowError: It is no finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"`{name}` is {value!r}, not a finite number")
    return number


def _classes(label: Any) -> Iterable[str | int]:
    """Names, or ids where they are whole numbers, also in texts, as CSV has them."""
    for value in label if isinstance(label, list) else [label]:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if not isinstance(value, str | int) or (isinstance(value, str) and not value.strip()):
            raise RowError(f"`label` holds {kind(value) if not isinstance(value, str) else 'empty text'}, not a class")
        yield int(value) if isinstance(value, bool) else value


def _id_of(value: str | int, labels: Sequence[str]) -> int:
    if str(value) in labels:
        return labels.index(str(value))
    if isinstance(value, int):
        if not 0 <= value < len(labels):
            raise RowError(
                f"the label {value} is out of range: there are {len(labels)} classes, 0 to {len(labels) - 1}"
            )
        return value
    known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    raise RowError(f"the label {value!r} is none of the classes {known}.{nearest(value, labels)}")


def _is_list_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")
