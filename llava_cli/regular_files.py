"""Reading files that somebody else has made: nothing but regular ones, for a FIFO or a device would never end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader

StrPath = str | os.PathLike[str]


class NotRegular(OSError):
    """A path is a FIFO, a socket, a device or a folder."""

    def __init__(self, path: StrPath) -> None:
        super().__init__(errno.EINVAL, "is not a regular file", os.fspath(path))


class TooLarge(OSError):
    """A file is larger than it may be."""


def open_regular(path: StrPath, follow: bool = True) -> BufferedReader:
    """The regular file at `path`, or the one that a link there leads to, where links may be followed.

    Raises `NotRegular`, or another `OSError`.
    """
    how = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO waits for a writer
    try:
        descriptor = os.open(path, how if follow else how | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        if os.path.exists(path) and not os.path.isfile(path):  # a socket, and where a system opens no folders
            raise NotRegular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(path)
    return open(descriptor, "rb")


def read(path: StrPath, most: int, follow: bool = True) -> bytes:
    """All of a regular file; raises `TooLarge` where that is more than `most` bytes, or what `open_regular` raises."""
    with open_regular(path, follow) as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(data) > most:
        raise TooLarge(errno.EFBIG, f"is larger than {most:,} bytes", os.fspath(path))
    return data
