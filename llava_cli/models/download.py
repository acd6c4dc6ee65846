"""Downloads models from the Hub into its own cache, and resumes interrupted downloads.

The layout is huggingface_hub's: `blobs/` holds the bytes, `snapshots/COMMIT/` links to them, `refs/main` names the
commit. huggingface_hub's own download starts again after every interruption, which on a slow line costs gigabytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llava_cli import files, limits
from llava_cli.errors import LlavaError, ModelUnusable, OutputError, message_line, os_reason
from llava_cli.models.aliases import ALIASES, repo_of
from llava_cli.models.hub import HubFile, list_files, request
from llava_cli.models.registry import Checkpoint, find, is_folder, record_pulled, repo_cache

_CHUNK_BYTES = 10 * 2**20
_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.ENOTDIR)
_RETRIES = 5
"""Failures in a row without a new byte of the file."""


def pull(name: str, progress: Callable[[int, int], None], check: Callable[[Checkpoint], object]) -> Path:
    """Downloads an alias or repo, resuming an earlier pull, and returns its folder.

    What is on disk is compared with the Hub's hashes, so another pull repairs a damaged file. `check` may refuse the
    model by its small files, before the weights are fetched. `progress` is called with (bytes on disk, bytes in all).
    Raises `ModelUnusable` if the Hub does not have or give it, `OutputError` if it cannot be written.
    """
    if is_folder(name) or (name not in ALIASES and "/" not in name):
        return find(name).folder  # already here; otherwise the error says what was probably meant
    cache, command = repo_cache(name), f"llava models pull {name}"
    done, total, commit = 0, 0, ""

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    try:
        commit, hub_files = list_files(name)
        if not any(file.name.endswith(".safetensors") for file in hub_files):
            raise ModelUnusable(name, "has no safetensors weights; pickles are never loaded")
        total = sum(file.size or 0 for file in hub_files)
        snapshot = cache / "snapshots" / commit
        for folder in (cache / "blobs", cache / "refs", cache / "snapshots", snapshot):
            files.make_folder(folder)
        missing = [file for file in hub_files if not _is_same(snapshot / file.name, file)]
        count(total - sum(file.size or 0 for file in missing))
        needed = sum((file.size or 0) - _bytes_on_disk(cache, file) for file in missing)
        if needed > (free := shutil.disk_usage(cache).free):
            raise OutputError(str(cache), f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        for file in missing:
            if file.name.endswith(".safetensors"):
                check(Checkpoint(name, snapshot))
            _fetch(name, commit, file, cache, count)
        files.atomic_write(cache / "refs" / "main", [commit.encode()])
        with suppress(OSError):  # the model is complete; it only does not become the default
            record_pulled(name)
        return snapshot
    except LlavaError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # errors of the Hub and the network have no errno
            hint = "HF_HOME=FOLDER names another place" if error.errno in _UNWRITABLE else command
            raise OutputError(str(error.filename or cache), os_reason(error), hint) from None
        words = "the download broke off" if commit else "the Hub cannot be reached"
        raise ModelUnusable(name, f"{words} ({message_line(error)})", command) from None


def _is_same(path: Path, file: HubFile) -> bool:
    """Whether a file on disk is the Hub's, byte for byte; if the Hub gives no hash, whether it exists."""
    if not path.is_file() or file.hash is None:
        return path.is_file()
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.is_lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as data:
        while chunk := data.read(2**20):
            digest.update(chunk)
    return digest.hexdigest() == file.hash


def _blob_paths(cache: Path, file: HubFile) -> tuple[Path, Path]:
    """Where the cache keeps a file's bytes, and where they are until all have arrived."""
    blob = cache / "blobs" / (file.hash or file.name)
    return blob, blob.with_name(f"{blob.name}.incomplete")


def _bytes_on_disk(cache: Path, file: HubFile) -> int:
    return sum(path.stat().st_size for path in _blob_paths(cache, file) if path.exists())


def _fetch(name: str, commit: str, file: HubFile, cache: Path, count: Callable[[int], None]) -> None:
    """Downloads a file and puts it in its place. Raises `ModelUnusable` or `OSError`."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # loaded lazily

    blob, incomplete = _blob_paths(cache, file)
    path = cache / "snapshots" / commit / file.name
    lock = cache.parent / ".locks" / cache.name / f"{blob.name}.lock"  # huggingface_hub's own
    files.make_folder(lock.parent)
    files.refuse_link(lock)
    with WeakFileLock(lock):
        if file.hash is not None and _is_same(blob, file):
            count(file.size or 0)
        else:
            _download(name, commit, file, incomplete, count)
            if file.hash is not None and not _is_same(incomplete, file):
                incomplete.unlink()
                raise ModelUnusable(name, f"{file.name} arrived damaged", f"llava models pull {name}")
            os.replace(incomplete, blob if file.hash is not None else path)
        if file.hash is not None:
            _link(path, blob)


def _link(path: Path, blob: Path) -> None:
    """Links a snapshot's file to its blob; moves the blob there on a system without links."""
    try:
        files.atomic_symlink(path, os.path.join("..", "..", blob.parent.name, blob.name))
    except OSError:
        os.replace(blob, path)


def _download(name: str, commit: str, file: HubFile, path: Path, count: Callable[[int], None]) -> None:
    """Appends the missing bytes of a file to `path`, with retries. Raises as `_receive`."""
    if file.hash is None:
        path.unlink(missing_ok=True)  # it may be of another version
    descriptor = files.open_for_writing(path, os.O_WRONLY | os.O_APPEND, files.SHARED)
    try:
        size, failures = os.fstat(descriptor).st_size, 0
        count(size)
        while file.size is None or size < file.size:
            try:
                _receive(name, commit, file, descriptor, count)
                return
            except (LlavaError, OSError):
                raise
            except Exception:  # the HTTP client's errors of a failing network, and `HubBusy`
                before, size = size, os.fstat(descriptor).st_size
                failures = 0 if size > before else failures + 1
                if failures > _RETRIES:
                    raise
                time.sleep(1)
    finally:
        os.close(descriptor)


def _receive(name: str, commit: str, file: HubFile, descriptor: int, count: Callable[[int], None]) -> None:
    """Appends the missing bytes of a file with one request.

    Raises `ModelUnusable` if too many bytes arrive, `OSError` if too few do or they cannot be written, and the HTTP
    client's errors if the network fails.
    """
    from huggingface_hub import constants, hf_hub_url

    size = os.fstat(descriptor).st_size
    most = limits.UNSIZED_FILE_BYTES if file.size is None else file.size
    url = hf_hub_url(repo_of(name), file.name, revision=commit)
    headers = {"Range": f"bytes={size}-"} if size else {}
    with request(name, url, constants.HF_HUB_DOWNLOAD_TIMEOUT, headers) as response:
        if size and response.status_code == 200:  # the server ignores ranges
            files.truncate(descriptor, 0)
            count(-size)
            size = 0
        for chunk in response.iter_raw(_CHUNK_BYTES):
            size += len(chunk)
            if size > most:
                files.truncate(descriptor, 0)
                reason = f"{file.name} is larger than the {most:,} bytes that it may have"
                raise ModelUnusable(name, reason, f"llava models pull {name}")
            files.write_all(descriptor, chunk)
            count(len(chunk))
    if file.size is not None and size < file.size:
        raise OSError(f"{size:,} of {file.size:,} bytes came")
