"""Rows as one table: Parquet, or CSV."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_cli import files, render
from llava_cli.batch.export import export_columns as columns_of
from llava_cli.batch.export.export_columns import Columns, as_text, cells, converted
from llava_cli.batch.export.export_job import Job
from llava_cli.batch.report.report import check_output
from llava_cli.errors import BadData, UsageError
from llava_cli.untrusted_text import printable

GROUP_ROWS = 5_000
"""Rows of Parquet that are in memory at a time, fewer where they are long."""
GROUP_CHARACTERS = 4_000_000
_FORMULA = re.compile(r"'*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
"""What a text begins with that a spreadsheet would compute, also in full width (OWASP, CSV Injection)."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?%?")
_QUOTED = re.compile(r'[",\r\n]|^\s|\s$|^$')


def export_parquet(job: Job) -> None:
    """Raises `BadData`, `UsageError`, `OutputTaken` or `OutputError`."""
    job.need("pyarrow", "tables")
    columns = _columns(job)
    _write(job, ".parquet", columns.rows, _parquet(job, columns))


def export_csv(job: Job) -> None:
    """Raises as `export_parquet`."""
    columns = _columns(job)
    table = _Csv(job, columns)
    _write(job, ".csv", columns.rows, table.lines())
    if table.marked and not job.quiet:
        render.note(f"  cells that begin like a formula, and have a ' before them for spreadsheets: {table.marked:,}")


def _columns(job: Job) -> Columns:
    """Raises `BadData` with the number of a row that does not fit a table."""
    columns = Columns()
    for number, row in job.chosen_rows():
        try:
            columns.add(row)
        except ValueError as error:
            raise BadData(f"{printable(str(job.rows.path))}, line {number}", str(error)) from None
    return columns


def _write(job: Job, ending: str, rows: int, chunks: Iterator[bytes]) -> None:
    """To -o, where `-` is stdout, or beside the rows."""
    if job.output == Path("-"):
        if ending == ".parquet" and sys.stdout.isatty():
            raise UsageError("-o -", "a terminal shows no Parquet", "-o out.parquet, or a pipe behind it")
        render.write_file(chunks)
        return
    output = job.output or job.rows.beside(ending)
    check_output(output, job.rows.path)
    with job.writing(output):
        change = files.update(output, chunks, job.force)
    job.outcome.done[change] += 1
    if not job.quiet:
        words = "unchanged" if change is files.Change.NONE else "written"
        render.note(f"{printable(str(output))}: {rows:,} row{'s' * (rows != 1)}, {words}")


# CSV: RFC 4180.


class _Csv:
    """The lines of a table, and how many of its cells had to be `marked`."""

    def __init__(self, job: Job, columns: Columns) -> None:
        self._job, self._columns = job, columns
        self.marked = 0

    def lines(self) -> Iterator[bytes]:
        yield self._line(self._columns.names)
        for _, row in self._job.chosen_rows():
            values = dict(cells(row))
            yield self._line([values.get(name) for name in self._columns.names])

    def _line(self, values: list[Any]) -> bytes:
        return (",".join(map(self._field, values)) + "\r\n").encode()

    def _field(self, value: Any) -> str:
        if value is None:
            return ""
        text = as_text(value)
        if isinstance(value, str) and _FORMULA.match(text) and not _NUMBER.fullmatch(text):
            self.marked += 1
            text = f"'{text}"
        return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text


# Parquet.


def _parquet(job: Job, columns: Columns) -> Iterator[bytes]:
    """The file in pieces, one for each group of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        columns_of.TEXT: pa.string(),
        columns_of.TEXTS: pa.list_(pa.string()),
        columns_of.BOOLEAN: pa.bool_(),
        columns_of.INTEGER: pa.int64(),
        columns_of.NUMBER: pa.float64(),
        columns_of.SHARES: pa.map_(pa.string(), pa.float64()),
    }
    kinds = {name: columns.kind(name) for name in columns.names}
    schema = pa.schema([(as_text(name), types[kind]) for name, kind in kinds.items()])
    sink = io.BytesIO()
    writer = pq.ParquetWriter(sink, schema, compression="zstd")
    for group in _groups(job):
        try:
            arrays = [
                pa.array([converted(row.get(name), kind) for row in group], types[kind]) for name, kind in kinds.items()
            ]
        except (pa.ArrowException, AttributeError, TypeError, ValueError):  # rows of other kinds than were looked at
            raise BadData(printable(str(job.rows.path)), "has changed just now", "try again") from None
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        yield sink.getvalue()
        sink.seek(0)
        sink.truncate()
    writer.close()
    yield sink.getvalue()


def _groups(job: Job) -> Iterator[list[dict[str, Any]]]:
    """Rows by the names of their columns, as many as are in memory at a time."""
    group: list[dict[str, Any]] = []
    characters = 0
    for _, row in job.chosen_rows():
        group.append(dict(cells(row)))
        characters += sum(len(value if isinstance(value, str) else repr(value)) for value in row.values())
        if len(group) == GROUP_ROWS or characters > GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
