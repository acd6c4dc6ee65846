"""Which files the rows of a batch may name: their author must not choose among all files that this user can read.

The settings beside a run's rows name the root folder of its pictures. An HMAC signature proves that this user wrote
them, rather than that they came with somebody's data set; its key is in the user's data folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

from llava_cli import cache_files, files
from llava_cli.paths import data_folder

_KEY_BYTES = 32


def resolve(path: str) -> str:
    """The absolute path with all links followed."""
    try:
        return os.path.realpath(path)
    except ValueError:  # an impossible name, such as one with a NUL: opening it fails with the reason
        return os.path.abspath(path)


def resolve_below(path: str, folder: str) -> str | None:
    """As `resolve`, or None if the result is not the folder or below it."""
    real_path = resolve(path)
    return real_path if is_below(real_path, os.path.realpath(folder)) else None


def is_below(path: str, folder: str) -> bool:
    """Whether a resolved path is a resolved folder, or below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def signature(rows: Path, root: str) -> str | None:
    """This user's signature that the rows in this file have their pictures below `root`; None if no key can be kept."""
    try:
        return _sign(_key(create=True), rows, root)
    except OSError:
        return None


def is_signed(rows: Path, root: str, signature: object) -> bool:
    """Whether a signature is this user's."""
    try:
        expected = _sign(_key(create=False), rows, root)
        return isinstance(signature, str) and hmac.compare_digest(expected, signature)
    except (OSError, TypeError):  # TypeError: it is not even ASCII
        return False


def _sign(key: bytes, rows: Path, root: str) -> str:
    statement = json.dumps([os.path.realpath(rows), root])
    return hmac.new(key, statement.encode(), hashlib.sha256).hexdigest()


def _key(create: bool) -> bytes:
    """Raises `OSError` if there is none."""
    path = files.follow_links(data_folder()) / "rows.key"
    if create and not path.exists():
        files.make_own_folder(path.parent)
        files.atomic_write(path, [os.urandom(_KEY_BYTES)], files.SECRET)
    key = cache_files.read(path, _KEY_BYTES)
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is damaged")
    return key
