"""Reads files that somebody else made, regular ones only: a FIFO or a device might never end."""

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
    """A file is larger than its limit."""


def open_regular(path: StrPath, follow: bool = True) -> BufferedReader:
    """Opens the regular file at `path`; `follow` says whether `path` may be a link to it.

    Raises `NotRegular`, or another `OSError`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a blocking open waits at a FIFO
    try:
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        if os.path.exists(path) and not os.path.isfile(path):  # a socket, or a folder where those cannot be opened
            raise NotRegular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(path)
    return open(descriptor, "rb")


def read(path: StrPath, most: int, follow: bool = True) -> bytes:
    """Reads a regular file. Raises `TooLarge` if it has more than `most` bytes, or what `open_regular` raises."""
    with open_regular(path, follow) as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(data) > most:
        raise TooLarge(errno.EFBIG, f"is larger than {most:,} bytes", os.fspath(path))
    return data
