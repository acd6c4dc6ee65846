"""Which files rows may name: whoever wrote them does not choose among all that this user may read.

Beside a run's rows stands the folder that its pictures are below. That it is this user's word, and did not come with
somebody's data set, is told by a signature, for which a key is kept in the user's data folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

from llava_cli import cache_files, files
from llava_cli.models.registry import data_folder

_KEY_BYTES = 32


def resolved(path: str) -> str:
    """Where a path leads once all links are followed."""
    try:
        return os.path.realpath(path)
    except ValueError:  # no name can be like that: who opens it says why
        return os.path.abspath(path)


def resolved_below(path: str, folder: str) -> str | None:
    """As `resolved`; None where that is not in the folder, or below it."""
    found = resolved(path)
    return found if is_below(found, os.path.realpath(folder)) else None


def is_below(path: str, folder: str) -> bool:
    """Whether an absolute path without links is that of a folder, or of something in it or below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def signature(rows: Path, root: str) -> str | None:
    """This user's, under rows in this place having their pictures below `root`; None where no key can be kept."""
    try:
        return _signed(_key(make=True), rows, root)
    except OSError:
        return None


def is_signed(rows: Path, root: str, by: object) -> bool:
    """Whether a signature is this user's."""
    try:
        return isinstance(by, str) and hmac.compare_digest(_signed(_key(make=False), rows, root), by)
    except (OSError, TypeError):  # TypeError: it is not even ASCII
        return False


def _signed(key: bytes, rows: Path, root: str) -> str:
    said = json.dumps([os.path.realpath(rows), root])
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes:
    """Raises `OSError` where there is none."""
    path = files.followed(data_folder()) / "rows.key"
    if make and not path.exists():
        files.make_own_folder(path.parent)
        files.put(path, [os.urandom(_KEY_BYTES)], files.SECRET)
    key = cache_files.read(path, _KEY_BYTES)
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is damaged")
    return key
