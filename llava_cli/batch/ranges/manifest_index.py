"""Where the ranges of a run begin in its manifest, so that the tasks of one are read without those before it."""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from llava_cli import limits, regular_files
from llava_cli.batch.journal import open_rows
from llava_cli.batch.ranges.row_range import Grid, RowRange

_HEADER = struct.Struct("<QQ")
"""The manifest's bytes and lines; behind them is the offset of each range, 8 bytes, too."""


class ManifestIndex:
    """The offsets of a manifest's ranges, in bytes."""

    NAME = "manifest.index"

    def __init__(self, size: int, total: int, offsets: array[int]) -> None:
        """`size` are the manifest's bytes, `total` its lines."""
        self._size, self.grid, self._offsets = size, Grid(total), offsets

    @classmethod
    def of(cls, folder: Path) -> ManifestIndex:
        """That of the manifest in a folder: as it was saved, or made anew. Raises `OSError`."""
        return _index_of(folder, (folder / "manifest").stat().st_size)

    @classmethod
    def parse(cls, data: bytes, size: int) -> ManifestIndex | None:
        """A saved one, if it is that of a manifest of so many bytes."""
        with suppress(struct.error, ValueError):
            of_size, total = _HEADER.unpack_from(data)
            offsets = array("Q", data[_HEADER.size :])
            if of_size == size and len(offsets) == Grid(total).count:
                return cls(size, total, offsets)
        return None

    @classmethod
    def made(cls, manifest: IO[bytes]) -> ManifestIndex:
        """That of an open file."""
        total = sum(1 for _ in manifest)
        grid, offset = Grid(total), 0
        offsets = array("Q")
        manifest.seek(0)
        for number, line in enumerate(manifest):
            if number % grid.size == 0:
                offsets.append(offset)
            offset += len(line)
        return cls(offset, total, offsets)

    def span(self, rows: RowRange) -> tuple[int, int]:
        """Where a range's tasks begin and end in the manifest, in bytes."""
        ends = self._offsets[rows.number + 1 : rows.number + 2]
        return self._offsets[rows.number], ends[0] if ends else self._size

    def to_bytes(self) -> bytes:
        """As it is saved."""
        return _HEADER.pack(self._size, self.grid.total) + self._offsets.tobytes()


@lru_cache(1)
def _index_of(folder: Path, size: int) -> ManifestIndex:
    with suppress(OSError), regular_files.open_regular(folder / ManifestIndex.NAME, follow=False) as file:
        if index := ManifestIndex.parse(file.read(limits.MANIFEST_INDEX_BYTES), size):
            return index
    with open_rows(folder / "manifest") as manifest:
        return ManifestIndex.made(manifest)
