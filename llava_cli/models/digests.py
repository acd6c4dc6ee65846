"""SHA-256 of whole files, cached between runs.

A file counts as unchanged while its device, inode, size and times are the same. A writer can set `mtime` back, but not
`ctime`, which the system sets on every change.
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
from llava_cli.paths import digest_cache
from llava_cli.regular_files import open_regular

MOST_CACHED = 1024
"""Files whose digests are cached: those that were read last."""
SETTLED_SECONDS = 2.0
"""A digest is cached only if the file has been unchanged for this long: a second change within one tick of the file
system's clock would go unnoticed, and the coarsest clocks tick this seldom."""
_CHUNK_BYTES = 1 << 20
_THREADS = 2
"""One thread hashes more slowly than a disk reads."""
_SHA256 = re.compile("[0-9a-f]{64}")


def sha256(paths: Sequence[Path]) -> list[str]:
    """The digest of each file, in hexadecimal. Raises `OSError`, also for what is not a regular file."""
    cached = _load_cache()
    digests = [cached.get(_identity(os.stat(path))) for path in paths]
    unread = [path for path, digest in zip(paths, digests, strict=True) if digest is None]
    if not unread:
        return [digest for digest in digests if digest is not None]
    from concurrent.futures import ThreadPoolExecutor  # takes longer to import than everything above

    with ThreadPoolExecutor(_THREADS) as threads:
        computed = dict(zip(unread, threads.map(_compute, unread), strict=True))
    if new := {identity: digest for digest, identity in computed.values() if identity}:
        _save_cache({**cached, **new})
    return [digest or computed[path][0] for path, digest in zip(paths, digests, strict=True)]


def _compute(path: Path) -> tuple[str, str | None]:
    """A file's digest, and the identity to cache it by: None if the file has changed meanwhile, or may have."""
    digest, chunk, start = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES)), time.time()
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
        after = os.fstat(file.fileno())
    is_settled = max(before.st_mtime, before.st_ctime) + SETTLED_SECONDS < start
    is_same = _identity(before) == _identity(after) == _identity(os.stat(path))
    return digest.hexdigest(), _identity(before) if is_settled and is_same else None


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _cache_file() -> Path:
    return digest_cache() / "sha256.json"


def _load_cache() -> dict[str, str]:
    """Digests by identity; empty if another user may have written them."""
    bounds = bounded_json.Bounds(limits.CACHE_FILE_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        content = bounded_json.loads(cache_files.read(_cache_file(), limits.CACHE_FILE_BYTES), bounds)
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(content, dict) and all(isinstance(digest, str) for digest in content.values())
    return content if is_valid and all(map(_SHA256.fullmatch, content.values())) else {}


def _save_cache(digests: dict[str, str]) -> None:
    newest = dict(list(digests.items())[-MOST_CACHED:])
    with suppress(OSError):  # without room for it the files are read once more
        cache_files.atomic_write(_cache_file(), [json.dumps(newest).encode()])
