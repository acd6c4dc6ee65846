"""Writes that survive a crash: whole or not at all, and on the disk before the next step counts on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write(descriptor: int, data: bytes) -> None:
    """All of `data`, however many calls that takes; on an error none, as far as the disk allows."""
    size = os.fstat(descriptor).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        with suppress(OSError):
            cut(descriptor, size)
        raise


def cut(descriptor: int, size: int) -> None:
    """Throws away what is behind `size` bytes."""
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def put(path: Path, chunks: Iterable[bytes]) -> None:
    """A file with this content in the place of whatever was there: readers see one or the other.

    Who may read it stays the same, and a link to a file stays one.
    """
    path = Path(os.path.realpath(path))
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb", buffering=0) as file:
            with suppress(OSError):
                os.fchmod(file.fileno(), os.stat(path).st_mode & 0o777)
            waiting = bytearray()
            for chunk in chunks:
                waiting += chunk
                if len(waiting) > 1_000_000:
                    write(file.fileno(), bytes(waiting))
                    waiting.clear()
            write(file.fileno(), bytes(waiting))
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
