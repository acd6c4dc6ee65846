"""The sandboxed job that reads tables in columns: Parquet, and Arrow's files and streams, with pyarrow.

The process cannot open the file: while it answers a request, it asks for the bytes that it needs. A message to it is a
request in JSON, or those bytes. A message from it begins with `READ`, then the offset and the number of bytes it wants;
with `JSON_REPLY` or `BYTES_REPLY`, then the answer; or with `ERROR`, then the reason.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from llava_cli import limits
from llava_cli.batch.sources.context import bounded_context
from llava_cli.sandbox.messages import receive, send

READ, JSON_REPLY, BYTES_REPLY, ERROR = b"R", b"J", b"B", b"E"
SPAN = struct.Struct("<QI")
BYTES, STRUCT, TEXT, SCALAR, OTHER = "bytes", "struct", "text", "scalar", "other"
"""Kinds of columns. A struct is that of the datasets library: a picture's `bytes` and `path`."""
LISTED_ROWS = 100
"""Rows of a list that are answered at a time."""
_CURSORS = 2
"""Places of the same columns that are read on from at a time."""
_BUFFER_BYTES = 1 << 18
_BATCH_BYTES = 1 << 23
"""Of the pictures that are read at a time, as far as their average says."""
_MODULES: dict[str, Any] = {}


def prepare() -> None:
    """Imports pyarrow, which starts no threads of its own then."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve more addresses than the process has
    pyarrow.set_cpu_count(1)
    bounded_context({"text": [""]})  # codecs, too, are found while files can be opened
    _MODULES.update(pa=pyarrow, parquet=pyarrow.parquet, ipc=pyarrow.ipc)


def answer(request: bytes) -> list[bytes]:
    """Runs one request: `open`, then any number of `list` and `picture`."""
    global _table
    try:
        words = json.loads(request)
        if words["do"] == "open":
            _table = _Table(words["format"], words["size"])
            return [JSON_REPLY, json.dumps(_table.columns()).encode()]
        if words["do"] == "list":
            return [JSON_REPLY, json.dumps(_table.rows(words["first"], words["columns"], words["path"])).encode()]
        return _table.picture(words["row"], words["column"])
    except Exception as error:  # pyarrow raises almost any for a damaged table
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        return [ERROR, reason.encode("utf-8", "replace")]


class _Asked(io.RawIOBase):
    """The table's file, whose bytes the other side has."""

    def __init__(self, size: int) -> None:
        self._size, self._place = size, 0
        self._requests = open(0, "rb", closefd=False)  # noqa: SIM115  (as long as the process)
        self._replies = open(1, "wb", closefd=False)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), limits.TABLE_READ_BYTES, max(self._size - self._place, 0))
        if not count:
            return 0
        send(self._replies, READ, SPAN.pack(self._place, count))
        data = receive(self._requests, count)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class _Table:
    """A table, and the places in it that were read last."""

    def __init__(self, format_: str, size: int) -> None:
        self._format, self._size = format_, size
        self._parquet: Any = None
        if format_ == "parquet":
            self._parquet = _MODULES["parquet"].ParquetFile(self._file(), buffer_size=_BUFFER_BYTES)
        self.schema = self._parquet.schema_arrow if self._parquet else self._reader(None).schema
        self._cursors: dict[tuple[str, ...], list[_Cursor]] = {}

    def columns(self) -> list[list[str]]:
        """Name and kind of each column."""
        return [[column.name, self._kind(column.type)] for column in self.schema]

    def rows(self, first: int, columns: list[str], path: str | None) -> list[Any]:
        """The next rows from `first` on, at most `LISTED_ROWS`: each `[path of its picture, other columns]`."""
        names = [*columns, *([path] if path is not None and path not in columns else [])]
        if not names and self._parquet:  # nothing is read to count them
            return [[None, None]] * max(0, min(LISTED_ROWS, self._parquet.metadata.num_rows - first))
        part = self._rows_from(first, tuple(names or self.schema.names[:1]), LISTED_ROWS)
        if part is None:
            return []
        if not names:
            return [[None, None]] * part.num_rows
        values = {name: self._values(part.column(name)) for name in names}
        found = []
        for number in range(part.num_rows):
            picture = values[path][number] if path is not None else None
            context = bounded_context({name: values[name][number] for name in columns})
            found.append([picture if isinstance(picture, str) else None, context])
        return found

    def _values(self, column: Any) -> list[Any]:
        """A column's values as JSON has them. Times are in UTC, since the names of zones are files."""
        pa = _MODULES["pa"]
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us"), safe=False)
        return [_plain(value) for value in column.to_pylist()]

    def picture(self, row: int, column: str) -> list[bytes]:
        """A row's picture: its bytes, or its path in JSON; null where it has none."""
        found = self._rows_from(row, (column,), 1)
        if found is None:
            return [ERROR, b"has no such row"]
        value = found.column(0)[0]
        path = None
        if self._kind(value.type) == STRUCT:
            path = value["path"].as_py() if value.is_valid and "path" in value.type.names else None
            value = value["bytes"] if value.is_valid else value
        if not value.is_valid or self._kind(value.type) == STRUCT:
            return [JSON_REPLY, json.dumps(path).encode()]
        buffer = value.as_buffer()
        if buffer.size > limits.PICTURE_BYTES:
            return [ERROR, b"too large"]
        return [BYTES_REPLY, buffer.to_pybytes()]

    def _rows_from(self, row: int, columns: tuple[str, ...], most: int) -> Any:
        """A batch that begins with a row, of these columns; None behind the last one."""
        cursor = self._cursor_before(row, columns)
        batch = cursor.move_to(row)
        return None if batch is None else batch.slice(row - cursor.first, most)

    def _cursor_before(self, row: int, columns: tuple[str, ...]) -> _Cursor:
        """The cursor that is nearest before a row. There are two: one looks for pages ahead of the other."""
        cursors = self._cursors.setdefault(columns, [])
        before = [cursor for cursor in cursors if cursor.first <= row]
        if before:
            return max(before, key=lambda cursor: cursor.first)
        if len(cursors) == _CURSORS:
            cursors.remove(min(cursors, key=lambda cursor: cursor.first))
        cursors.append(_Cursor(*self._batches_from(row, columns)))
        return cursors[-1]

    def _batches_from(self, row: int, columns: tuple[str, ...]) -> tuple[Iterator[Any], int]:
        """Batches that begin at or before a row, and the number of their first row."""
        if not self._parquet:
            return self._record_batches(columns), 0
        metadata = self._parquet.metadata
        first = group = 0
        while group < metadata.num_row_groups and row >= first + metadata.row_group(group).num_rows:
            first += metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, metadata.num_row_groups))
        options = {"batch_size": self._batch_rows(columns), "columns": list(columns), "use_threads": False}
        return (self._parquet.iter_batches(row_groups=groups, **options) if groups else iter(())), first

    def _batch_rows(self, columns: tuple[str, ...]) -> int:
        """How many rows are read at a time, from the average of their bytes."""
        metadata, total = self._parquet.metadata, 0
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
            total += sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns
            )
        return max(1, min(LISTED_ROWS, int(_BATCH_BYTES * metadata.num_rows / max(total, 1))))

    def _record_batches(self, columns: tuple[str, ...]) -> Iterator[Any]:
        fields = [self.schema.get_field_index(name) for name in columns]
        reader = self._reader(fields)
        batches = iter(reader) if self._format == "stream" else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            yield batch.select(list(columns)) if columns else batch

    def _reader(self, fields: list[int] | None) -> Any:
        """Arrow's reader, of these columns only."""
        ipc = _MODULES["ipc"]
        options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        return (ipc.open_stream if self._format == "stream" else ipc.open_file)(self._file(), options=options)

    def _file(self) -> Any:
        return _MODULES["pa"].PythonFile(io.BufferedReader(_Asked(self._size), _BUFFER_BYTES), mode="r")

    def _kind(self, type_: Any) -> str:
        types = _MODULES["pa"].types
        if types.is_struct(type_):
            is_picture = "bytes" in type_.names and self._kind(type_.field("bytes").type) == BYTES
            return STRUCT if is_picture else OTHER
        if types.is_dictionary(type_):
            return self._kind(type_.value_type)
        if types.is_list(type_) or types.is_large_list(type_):
            return SCALAR if self._kind(type_.value_type) == TEXT else OTHER
        return next(
            (kind for kind, names in _KINDS.items() if any(getattr(types, name)(type_) for name in names)), OTHER
        )


class _Cursor:
    """A place in a table that moves on."""

    def __init__(self, batches: Iterator[Any], first: int) -> None:
        self._batches, self.first = batches, first
        """The number of the current batch's first row."""
        self._batch = next(batches, None)

    def move_to(self, row: int) -> Any:
        """The batch that has this row, which is not before the current one; None behind the last one."""
        while self._batch is not None and row >= self.first + self._batch.num_rows:
            self.first += self._batch.num_rows
            self._batch = None  # freed before the next one is read
            self._batch = next(self._batches, None)
        return self._batch


_table: _Table
_KINDS = {
    BYTES: ("is_binary", "is_large_binary"),
    TEXT: ("is_string", "is_large_string"),
    SCALAR: ("is_integer", "is_floating", "is_boolean", "is_decimal", "is_temporal"),
}
_PLAIN: dict[type, Callable[[Any], Any]] = {
    datetime: datetime.isoformat,
    date: date.isoformat,
    time: time.isoformat,
    timedelta: timedelta.total_seconds,
    Decimal: str,
}


def _plain(value: Any) -> Any:
    """A column's value as JSON has it."""
    return _PLAIN.get(type(value), lambda same: same)(value)
