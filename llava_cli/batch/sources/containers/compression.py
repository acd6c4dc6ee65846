"""Compressed streams: gzip, bzip2, xz and Zstandard, with a bound on what they unpack to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from llava_cli import limits
from llava_cli.batch.sources.containers.container import OpenFile
from llava_cli.errors import BadData

UNPACK_ERRORS = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a damaged stream raises."""
_BLOCK = 1 << 16


class Unpacked(io.RawIOBase):
    """What a compressed file unpacks to. Reading raises one of `UNPACK_ERRORS`, or `BadData` for a bomb."""

    def __init__(self, name: str, format_: str, file: BinaryIO) -> None:
        self._name, self._source = name, _Counted(file)
        file = _OPENERS[format_](self._source)  # type: ignore[arg-type]  # they only read it
        self._read = getattr(file, "read1", file.read)  # what is there before damage is not lost
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        self._count += len(data)
        if self._count > limits.ARCHIVE_SLACK_BYTES + limits.ARCHIVE_RATIO * self._source.count:
            raise BadData(self._name, f"unpacks to more than {limits.ARCHIVE_RATIO:,} times its size")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def unpacking(name: str, format_: str, open_file: OpenFile) -> OpenFile:
    """As `open_file`, unpacked."""
    return lambda: io.BufferedReader(Unpacked(name, format_, open_file()), _BLOCK)


class _Counted(io.RawIOBase):
    """A file that is read once, and the number of bytes that have been."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self.count += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Xz(io.RawIOBase):
    """An xz stream, or several; `lzma.LZMAFile` would take as much memory as the file says."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=limits.ARCHIVE_WINDOW_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data or self._file.read(_BLOCK)
                if not rest.strip(b"\0"):  # padding behind the last stream
                    return 0
                self._decoder = self._new()
                data = self._decoder.decompress(rest.lstrip(b"\0"), len(buffer))
            else:
                more = self._file.read(_BLOCK) if self._decoder.needs_input else b""
                if not more and self._decoder.needs_input:
                    raise EOFError("cut off")
                data = self._decoder.decompress(more, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


def _zstd(file: BinaryIO) -> Any:
    """Python's own from 3.14 on, else pyarrow's."""
    try:
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.ZstdFile(file)
    except ImportError:
        pass
    try:
        import pyarrow
    except ImportError:
        raise BadData("Zstandard", "is not unpacked by this Python", "pip install 'llava-cli[tables]'") from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": _Xz,
    "zstd": _zstd,
}
FORMATS = tuple(_OPENERS)
"""Names of `images.formats`."""
