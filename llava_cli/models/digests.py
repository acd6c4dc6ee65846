"""SHA-256 of whole files, each read once: what is known of one is remembered in the user's cache.

A file is the same as long as its device, inode, size and times are. Whoever writes to it can set `mtime` back, but not
`ctime`, with which the system stamps each change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava_cli import bounded_json, cache_files, limits
from llava_cli.models import registry
from llava_cli.regular_files import open_regular

REMEMBERED = 1024
"""Files, the last ones that were read."""
SETTLED = 2.0
"""Seconds that a file has been left alone before its digest is remembered: of two changes that are closer together than
its file system's clock ticks, the second one cannot be seen, and the coarsest clock ticks so seldom."""
_PIECE = 1 << 20
_AT_ONCE = 2
"""Files: a thread hashes more slowly than a disk reads."""


def sha256(paths: Sequence[Path]) -> list[str]:
    """Of each file, in hexadecimal. Raises `OSError`, also for what is no regular file."""
    known = _remembered()
    found = [known.get(_identity(os.stat(path))) for path in paths]
    unknown = [path for path, digest in zip(paths, found, strict=True) if digest is None]
    if not unknown:
        return [digest for digest in found if digest is not None]
    from concurrent.futures import ThreadPoolExecutor  # which takes longer to load than all of the above

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        read = dict(zip(unknown, threads.map(_read, unknown), strict=True))
    if new := {identity: digest for digest, identity in read.values() if identity}:
        _remember({**known, **new})
    return [digest or read[path][0] for path, digest in zip(paths, found, strict=True)]


def _read(path: Path) -> tuple[str, str | None]:
    """A file's digest, and the identity to remember it by: None where it changed meanwhile, or may have."""
    digest, piece, begin = hashlib.sha256(), memoryview(bytearray(_PIECE)), time.time()
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        while size := file.readinto(piece):
            digest.update(piece[:size])
        after = os.fstat(file.fileno())
    settled = max(before.st_mtime, before.st_ctime) + SETTLED < begin
    same = _identity(before) == _identity(after) == _identity(os.stat(path))
    return digest.hexdigest(), _identity(before) if settled and same else None


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _file() -> Path:
    return registry.digest_cache() / "sha256.json"


def _remembered() -> dict[str, str]:
    """Digests by identity; none where another user may have written them."""
    bounds = bounded_json.Bounds(limits.CACHE_FILE_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        known = bounded_json.loads(cache_files.read(_file(), limits.CACHE_FILE_BYTES), bounds)
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(digest, str) for digest in known.values())
    return known if whole and all(map(_SHA256.fullmatch, known.values())) else {}


def _remember(known: dict[str, str]) -> None:
    with suppress(OSError):  # without room for them the files are read once more
        cache_files.put(_file(), [json.dumps(dict(list(known.items())[-REMEMBERED:])).encode()])


_SHA256 = re.compile("[0-9a-f]{64}")
