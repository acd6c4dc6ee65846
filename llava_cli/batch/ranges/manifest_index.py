"""Where the ranges of a run begin in its manifest, so that the tasks of one are read without those before it."""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from llava_cli import files, limits, regular_files
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

    def offset(self, rows: RowRange) -> int:
        return self._offsets[rows.number]

    def save(self, folder: Path) -> None:
        """Raises `OSError`."""
        files.atomic_write(folder / self.NAME, [_HEADER.pack(self._size, self.grid.total), self._offsets.tobytes()])


@lru_cache(1)
def _index_of(folder: Path, size: int) -> ManifestIndex:
    return _saved(folder, size) or _made(folder, size)


def _saved(folder: Path, size: int) -> ManifestIndex | None:
    """The saved index, if it is that of a manifest of so many bytes."""
    with suppress(OSError, struct.error, ValueError):
        with regular_files.open_regular(folder / ManifestIndex.NAME, follow=False) as file:
            data = file.read(limits.MANIFEST_INDEX_BYTES)
        of_size, total = _HEADER.unpack_from(data)
        offsets = array("Q", data[_HEADER.size :])
        if of_size == size and len(offsets) == Grid(total).count:
            return ManifestIndex(size, total, offsets)
    return None


def _made(folder: Path, size: int) -> ManifestIndex:
    with open_rows(folder / "manifest") as file:
        total = sum(1 for _ in file)
        grid, offset = Grid(total), 0
        offsets = array("Q")
        file.seek(0)
        for number, line in enumerate(file):
            if number % grid.size == 0:
                offsets.append(offset)
            offset += len(line)
    return ManifestIndex(size, total, offsets)
