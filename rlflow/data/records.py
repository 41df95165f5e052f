"""The one path that every kind of training takes from the recipe's sources to rows with stable ids.

    SourceBlock --read_table--> Table --to_record--> Record --build--> what the caller trains on --draw--> Loaded

A row that fails anywhere on it is set aside with its reason, and counts against its source's ``max_bad_rows``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from rlflow.data.errors import BadRow, DataError, RowError, Rows, listing
from rlflow.data.formats import Record, format_of, format_of_row, to_record
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.sampler import permutation
from rlflow.data.sources import Row, Table, read_table
from rlflow.data.thoughts import in_text
from rlflow.recipe.data_blocks import SourceBlock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """A row on its way to training."""

    id: str
    """``<stem>:<row>``; ``#2`` and so on follow when ``rows`` repeats it."""
    place: str
    row: int
    value: T

    def bad(self, reason: str) -> BadRow:
        """This row, set aside."""
        return BadRow(self.place, self.row, reason)


def load_records(
    sources: SourceBlock | Sequence[SourceBlock],
    seed: int,
    build: Callable[[Record], T],
    *,
    judged: bool = False,
    vision: ImageProcessor | None = None,
    as_columns: bool = False,
) -> Rows[Loaded[T]]:
    """Reads the sources one after the other and makes each row what ``build`` returns for it.

    Args:
        sources: the recipe's.
        seed: the run's; it decides which rows ``SourceBlock.rows`` draws.
        build: raises RowError for a row it cannot use.
        judged: a column ``label`` says whether the answer is desirable.
        vision: of a model that takes pictures.
        as_columns: records are the rows as they are, all of them columns, whatever a source's ``format``.

    Raises:
        DataError: a source cannot be read, has more bad rows than it may, or nothing else.
    """
    loaded: Rows[Loaded[T]] = Rows()
    stems: Counter[str] = Counter()
    for source in [sources] if isinstance(sources, SourceBlock) else sources:
        table = read_table(source)
        stems[table.stem] += 1
        name = table.stem if stems[table.stem] == 1 else f"{table.stem}-{stems[table.stem]}"
        rows = _build_rows(table, name, source, build, judged, vision, as_columns)
        loaded.extend(_draw(rows, name, source.rows, seed))
        loaded.skipped.extend(rows.skipped)
    if len({row.id for row in loaded}) < len(loaded):
        raise DataError("two data sources give their rows the same ids. Rename one of the files.")
    return loaded


def _build_rows(
    table: Table,
    name: str,
    source: SourceBlock,
    build: Callable[[Record], T],
    judged: bool,
    vision: ImageProcessor | None,
    as_columns: bool,
) -> Rows[Loaded[T]]:
    rows: Rows[Loaded[T]] = Rows(skipped=table.bad)
    if table.rows:
        guessed = source.format == "auto" and not as_columns
        form = format_of(table, judged=judged) if guessed else source.format
        for row in table.rows:
            try:
                record = (
                    Record(dict(row.columns), directory=table.directory)
                    if as_columns
                    else to_record(row, form, vision, table.directory)
                )
                value = build(_with_thoughts_in_text(record) if source.reasoning == "inline" else record)
            except RowError as error:
                reason = f"{error}{_of_another_format(row, form, judged) if guessed else ''}"
                rows.skipped.append(BadRow(table.place, row.number, reason))
            else:
                rows.append(Loaded(f"{name}:{row.number}", table.place, row.number, value))
    rows.skipped.sort(key=lambda row: row.row)
    refuse_bad_rows(table.place, rows.skipped, source.max_bad_rows)
    if not rows:
        raise DataError(f"{table.place}: every row is bad.{_named(rows.skipped)}")
    return rows


def _of_another_format(row: Row, form: str, judged: bool) -> str:
    """What to add to a row's fault where it is that the row is none of the table's format."""
    # A row without a label is a row of this format that lacks one.
    there = replace(row, columns={**row.columns, "label": True}) if judged else row
    own = format_of_row(there, judged=judged)
    if own is None or own == form:
        return ""
    return f" (its columns are those of the format {own}, and most rows are of {form})"


def _with_thoughts_in_text(record: Record) -> Record:
    rejected = None if record.rejected is None else in_text(record.rejected)
    return replace(record, messages=in_text(record.messages), rejected=rejected)


def refuse_bad_rows(place: str, bad: Sequence[BadRow], most: int) -> None:
    """Raises a DataError that names the bad rows of a source where they are more than its ``max_bad_rows``."""
    if len(bad) > most:
        raise DataError(
            f"{place}: {len(bad)} bad row{'s' if len(bad) > 1 else ''}, and max_bad_rows is {most}.{_named(bad)}\n"
            f"Repair them, or leave them out with `max_bad_rows: {len(bad)}` in this source."
        )


def _named(bad: Sequence[BadRow]) -> str:
    return listing([f"row {row.row}: {row.reason}" for row in bad])


def _draw(rows: Sequence[Loaded[T]], name: str, wanted: int | None, seed: int) -> Iterator[Loaded[T]]:
    """All rows, or as many as wanted: whole passes over the rows, then a random part, in the order of the file."""
    if wanted is None:
        yield from rows
        return
    passes, rest = divmod(wanted, len(rows))
    part = sorted(permutation(len(rows), seed, f"rows of {name}")[:rest])
    for number in range(1, passes + 2):
        for row in rows if number <= passes else [rows[index] for index in part]:
            yield row if number == 1 else replace(row, id=f"{row.id}#{number}")
