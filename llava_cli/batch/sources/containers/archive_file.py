"""An archive's bytes: at any offset from several threads, or one after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from llava_cli import regular_files
from llava_cli.batch.sources.containers.container import OpenFile
from llava_cli.errors import InputMissing, os_reason
from llava_cli.regular_files import NotRegular
from llava_cli.untrusted_text import printable

_BLOCK = 1 << 18


class LocalFile:
    """Opens a file of this disk, each time the same one. A call raises `InputMissing`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity: tuple[int, ...] | None = None

    def __call__(self) -> BinaryIO:
        try:
            file = regular_files.open_regular(self._path)
        except NotRegular:
            raise InputMissing(printable(self._path), "not a regular file") from None
        except (OSError, ValueError) as error:
            raise InputMissing(printable(self._path), os_reason(error)) from None
        status = os.fstat(file.fileno())
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if identity != (self._identity or identity):
            file.close()
            raise InputMissing(printable(self._path), "it has changed since it was listed", "start the command again")
        self._identity = identity
        return file


class ArchiveFile:
    """Reads at any offset of what `open_file` opens, which is once for each thread."""

    def __init__(self, name: str, open_file: OpenFile) -> None:
        self.name, self._open = name, open_file
        self._local = threading.local()
        self._files: list[BinaryIO] = []

    def file(self) -> BinaryIO:
        """This thread's. Raises as `OpenFile`."""
        if getattr(self._local, "file", None) is None:
            self._local.file = self._open()
            self._files.append(self._local.file)
        return self._local.file  # type: ignore[no-any-return]

    def read_at(self, offset: int, count: int) -> bytes:
        """The bytes at an offset, fewer at the end. Raises `InputMissing` if they cannot be read."""
        with reading(self.name):
            file = self.file()
            file.seek(offset)
            return file.read(count)

    def size(self) -> int:
        with reading(self.name):
            return self.file().seek(0, os.SEEK_END)

    def close(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()
        self._files.clear()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Translates an `OSError` into `InputMissing`, about the archive of this name."""
    try:
        yield
    except OSError as error:
        raise InputMissing(name, os_reason(error)) from None


class Forward:
    """A stream from its beginning on; `can_return` says that it may be moved back."""

    def __init__(self, file: BinaryIO, can_return: bool) -> None:
        self._file, self._can_return = file, can_return
        self.position, self._size = 0, 0
        if can_return:
            self._size = file.seek(0, os.SEEK_END)
            file.seek(0)

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        parts = []
        while count > 0 and (data := self._file.read(min(count, _BLOCK))):
            parts.append(data)
            count -= len(data)
            self.position += len(data)
        return b"".join(parts)

    def move_to(self, position: int) -> int:
        """Moves on to a position; returns it, or where the stream has ended before. Raises `ValueError` if behind."""
        if self._can_return:
            self.position = self._file.seek(min(position, self._size))
        elif position < self.position:
            raise ValueError("a stream does not return")
        while self.position < position and self.read(min(position - self.position, _BLOCK)):
            pass
        return self.position

    def close(self) -> None:
        self._file.close()
