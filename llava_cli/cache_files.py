"""Files of the user's cache that are trusted without a check: digests, quantized weights, machine code.

Whoever else could write one of them could control what the user's commands compute. So each file, and its folder, must
belong to this user and be writable by nobody else; otherwise it is not used.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llava_cli import files, regular_files

DISK_RESERVE = 1 << 30
"""Bytes that large cache files leave free on a disk."""


def make_folder(path: Path) -> Path:
    """Makes a folder for this user alone unless it is there, and returns it, since it may be a link to a larger disk.

    A folder that a group may write, as some umasks have it, is closed to that group. Raises `OSError` if it is another
    user's.
    """
    path = files.follow_links(path)
    files.make_folder(path, 0o700)
    status = os.lstat(path)
    if not files.is_this_users(status):
        raise PermissionError(errno.EPERM, "belongs to another user", os.fspath(path))
    if not _only_this_user_writes(status):
        os.chmod(path, 0o700)
    return path


def is_private(path: Path) -> bool:
    """Whether a path is no link, and what is there can be written by this user alone."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and _only_this_user_writes(status)


def check(path: Path) -> None:
    """Raises `OSError` if somebody else may have written a file, or put it into its folder."""
    for part in (files.follow_links(path.parent), path):
        if not is_private(part):
            raise PermissionError(errno.EPERM, "may be another user's", os.fspath(part))


def read(path: Path, most: int) -> bytes:
    """Reads a file. Raises `OSError` as `check` does, and if it has more than `most` bytes."""
    check(path)
    return regular_files.read(path, most)


def atomic_write(path: Path, chunks: Iterable[bytes]) -> None:
    """Replaces whatever is at `path` with a file for this user alone. Raises `OSError`."""
    path = make_folder(path.parent) / path.name
    with suppress(FileNotFoundError):
        path.unlink()  # or the new file would get its mode
    files.atomic_write(path, chunks, files.SECRET)


def _only_this_user_writes(status: os.stat_result) -> bool:
    others_write = hasattr(os, "geteuid") and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return files.is_this_users(status) and not others_write
