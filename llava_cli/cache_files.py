"""Files of the user's cache that are taken at their word: digests, quantized weights, machine code.

Whoever else could write one of them could have the user's commands compute with it. So each file, and the folder that
it is in, belongs to this user and may be written by nobody else; what is not like that is not used.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llava_cli import files, regular_files


def make_folder(path: Path) -> Path:
    """A folder of this user's alone, and where it is, for it may be a link of this user's to a larger disk.

    One that was made where the umask lets a group write is closed to that group. Raises `OSError` where it is another
    user's.
    """
    path = files.followed(path)
    files.make_folder(path, 0o700)
    status = os.lstat(path)
    if not files.is_this_users(status):
        raise PermissionError(errno.EPERM, "belongs to another user", os.fspath(path))
    if not _is_ours(status):
        os.chmod(path, 0o700)
    return path


def is_ours(path: Path) -> bool:
    """Whether a path is no link, and nobody but this user may write what is there."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and _is_ours(status)


def check(path: Path) -> None:
    """Raises `OSError` where somebody else may have written a file, or put it into its folder."""
    for part in (files.followed(path.parent), path):
        if not is_ours(part):
            raise PermissionError(errno.EPERM, "may be another user's", os.fspath(part))


def read(path: Path, most: int) -> bytes:
    """What is in a file; raises `OSError` as `check` does, and where that is more than `most` bytes."""
    check(path)
    return regular_files.read(path, most)


def put(path: Path, chunks: Iterable[bytes]) -> None:
    """A file of this user's alone in the place of whatever was there; raises `OSError`."""
    path = make_folder(path.parent) / path.name
    with suppress(FileNotFoundError):
        path.unlink()  # else the new one had its mode
    files.put(path, chunks, files.SECRET)


def _is_ours(status: os.stat_result) -> bool:
    others_write = hasattr(os, "geteuid") and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return files.is_this_users(status) and not others_write
