"""Downloads from the Hub into its own cache, going on where an earlier download was cut off.

What the Hub says is not taken at its word: a commit, a hash or a name becomes a part of a path only if it looks like
one, and of a file no more is written than was said to come.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llava_cli import bounded_json, files, limits
from llava_cli.errors import LlavaError, ModelUnusable, OutputError, brief
from llava_cli.models.registry import ALIASES, Checkpoint, find, is_commit, is_folder, remember, repo_cache, repo_of
from llava_cli.untrusted_text import one_line

# Weights in safetensors and what it takes to use them; never pickles, never code.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_CHUNK = 10 * 2**20
_NO_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR)
_RETRIES = 5
"""In a row without a byte more of the file."""
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL)
"""Names that Windows gives to devices, whatever ending they have."""


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it, fit to become a part of a path."""

    name: str
    size: int | None
    """Of a mirror that lists names alone it is None, and so is the hash."""
    hash: str | None
    """SHA-256 of a big file, git's own hash of a small one."""
    is_big: bool


def pull(name: str, progress: Callable[[int, int], None], judge: Callable[[Checkpoint], object]) -> Path:
    """Downloads an alias or repo, going on where an earlier pull was cut off, and returns its folder.

    What is on disk is compared with the Hub's hashes, so that another pull mends a damaged file.
    `judge` may refuse the model from its small files, before the weights are fetched. `progress` is
    called with (bytes here, bytes in all). Raises `ModelUnusable` where the Hub does not have or give
    it, `OutputError` where it cannot be written.
    """
    if is_folder(name) or (name not in ALIASES and "/" not in name):
        return find(name).folder  # here already; where it is not, says what was probably meant
    cache, again = repo_cache(name), f"llava models pull {name}"
    done, total, commit = 0, 0, ""

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    try:
        commit, listed = _listing(name)
        wanted = _wanted(name, listed)
        if not any(file.name.endswith(".safetensors") for file in wanted):
            raise ModelUnusable(name, "has no safetensors weights; pickles are never loaded")
        total = sum(file.size or 0 for file in wanted)
        snapshot = cache / "snapshots" / commit
        for folder in (cache / "blobs", cache / "refs", cache / "snapshots", snapshot):
            files.make_folder(folder)
        missing = [file for file in wanted if not _is_same(snapshot / file.name, file)]
        count(total - sum(file.size or 0 for file in missing))
        needed = sum((file.size or 0) - _fetched(cache, file) for file in missing)
        if needed > (free := shutil.disk_usage(cache).free):
            raise OutputError(str(cache), f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        for file in missing:
            if file.name.endswith(".safetensors"):
                judge(Checkpoint(name, snapshot))
            _fetch(name, commit, file, cache, count)
        files.put(cache / "refs" / "main", [commit.encode()])
        with suppress(OSError):  # then it is no default, but whole
            remember(name)
        return snapshot
    except LlavaError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the Hub's and the network's have none
            hint = "HF_HOME=FOLDER names another place" if error.errno in _NO_PLACE else again
            raise OutputError(str(error.filename or cache), error.strerror or str(error), hint) from None
        what = "the download broke off" if commit else "the Hub cannot be reached"
        raise ModelUnusable(name, f"{what} ({brief(error)})", again) from None


def _listing(name: str) -> tuple[str, list[Any]]:
    """The commit and the files that the Hub has of a model, the latter as they come. Raises `ModelUnusable`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # loaded lazily

    try:
        validate_repo_id(repo_of(name))
    except HFValidationError:
        raise _unknown(name) from None
    url = f"{constants.ENDPOINT}/api/models/{repo_of(name)}?blobs=true"
    bounds = bounded_json.Bounds(limits.HUB_REPLY_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    data = bytearray()
    with _asked(name, url, constants.HF_HUB_ETAG_TIMEOUT) as response:
        for piece in response.iter_raw():
            data += piece
            if len(data) > bounds.bytes:
                break
    try:
        info = bounded_json.loads(bytes(data), bounds)
    except bounded_json.TooMuch as error:
        raise ModelUnusable(name, f"the Hub's list of its files is {error}") from None
    commit, listed = (info.get("sha"), info.get("siblings")) if isinstance(info, dict) else (None, None)
    if not isinstance(listed, list):
        raise ModelUnusable(name, "the Hub does not list its files")
    if not isinstance(commit, str) or not is_commit(commit):
        raise ModelUnusable(name, f"the Hub names no commit of it, but {_shown(commit)}")
    return commit, listed


def _wanted(name: str, listed: list[Any]) -> list[HubFile]:
    """The files that make up the checkpoint, the weights last: where they are whole, all is. Raises `ModelUnusable`."""

    def wanted(file: Any) -> bool:
        path = file.get("rfilename") if isinstance(file, dict) else None
        # Folders hold other formats, and "consolidated" weights are the same ones once more.
        is_one = isinstance(path, str) and "/" not in path and not path.startswith("consolidated")
        return is_one and any(fnmatch(path, pattern) for pattern in WANTED)

    return sorted(
        (_judged(name, file) for file in listed if wanted(file)), key=lambda f: f.name.endswith(".safetensors")
    )


def _judged(name: str, file: dict[str, Any]) -> HubFile:
    """A file whose name, size and hash are what they should be; raises `ModelUnusable`, with what is not."""
    path, size, big = file["rfilename"], file.get("size"), file.get("lfs")
    digest, length = (big.get("sha256"), 64) if isinstance(big, dict) else (file.get("blobId"), 40)
    if not _is_plain(path):
        raise ModelUnusable(name, f"{_shown(path)} is no name for a file")
    if size is not None and (type(size) is not int or not 0 <= size <= limits.HUB_FILE_BYTES):
        raise ModelUnusable(name, f"{path} cannot have {_shown(size)} bytes")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)):
        raise ModelUnusable(name, f"{path} has no such hash as {_shown(digest)}")
    return HubFile(path, size, digest if size is not None else None, isinstance(big, dict))


def _is_plain(name: str) -> bool:
    """Whether a name is that of one file on every system, and nothing else."""
    is_short = 0 < len(name) <= limits.NAME_CHARACTERS
    has_signs = name.startswith(".") or any(sign in name for sign in "/\\:") or not name.isprintable()
    return is_short and not has_signs and not _DEVICES.fullmatch(name)


def _shown(value: Any) -> str:
    """What the Hub says, in a few signs."""
    return repr(one_line(value, 60) if isinstance(value, str) else value)[:80]


def _is_same(path: Path, file: HubFile) -> bool:
    """Whether a file on disk is, byte for byte, what the Hub has."""
    if not path.is_file() or file.hash is None:
        return path.is_file()  # a mirror of the Hub may list names alone
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.is_big else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as data:
        while part := data.read(2**20):
            digest.update(part)
    return digest.hexdigest() == file.hash


def _blob(cache: Path, file: HubFile) -> tuple[Path, Path]:
    """Where the cache keeps a file's bytes, and where they are until all have come."""
    blob = cache / "blobs" / (file.hash or file.name)
    return blob, blob.with_name(f"{blob.name}.incomplete")


def _fetched(cache: Path, file: HubFile) -> int:
    return sum(path.stat().st_size for path in _blob(cache, file) if path.exists())


def _fetch(name: str, commit: str, file: HubFile, cache: Path, count: Callable[[int], None]) -> None:
    """Downloads a file and puts it in its place, as huggingface_hub has it; raises `ModelUnusable` or `OSError`.

    Its own download begins anew after every break: GBs on a slow line.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # loaded lazily

    blob, part = _blob(cache, file)
    place = cache / "snapshots" / commit / file.name
    lock = cache.parent / ".locks" / cache.name / f"{blob.name}.lock"  # huggingface_hub's own
    files.make_folder(lock.parent)
    files.refuse_link(lock)
    with WeakFileLock(lock):
        if file.hash is not None and _is_same(blob, file):
            count(file.size or 0)
        else:
            _download(name, commit, file, part, count)
            if file.hash is not None and not _is_same(part, file):
                part.unlink()
                raise ModelUnusable(name, f"{file.name} arrived damaged", f"llava models pull {name}")
            os.replace(part, blob if file.hash is not None else place)
        if file.hash is not None:
            _link(place, blob)


def _link(place: Path, blob: Path) -> None:
    """Makes the file in a snapshot: a link to its bytes, or where a system has none, those themselves."""
    try:
        files.put_link(place, os.path.join("..", "..", blob.parent.name, blob.name))
    except OSError:
        os.replace(blob, place)


def _download(name: str, commit: str, file: HubFile, part: Path, count: Callable[[int], None]) -> None:
    """Appends the bytes of a file that are not there yet, in several tries. Raises as `_receive`."""
    if file.hash is None:
        part.unlink(missing_ok=True)  # nobody could tell what it is of
    descriptor = files.open_for_writing(part, os.O_WRONLY | os.O_APPEND, files.SHARED)
    try:
        here, failures = os.fstat(descriptor).st_size, 0
        count(here)
        while file.size is None or here < file.size:
            try:
                _receive(name, commit, file, descriptor, count)
                return
            except (LlavaError, OSError):
                raise
            except Exception:  # whatever the library below calls a network that fails
                before, here = here, os.fstat(descriptor).st_size
                failures = 0 if here > before else failures + 1
                if failures > _RETRIES:
                    raise
                time.sleep(1)
    finally:
        os.close(descriptor)


def _receive(name: str, commit: str, file: HubFile, descriptor: int, count: Callable[[int], None]) -> None:
    """One request for what is missing of a file.

    Raises `ModelUnusable` where more comes than should, `OSError` where less does or it cannot be written, and what
    the library below raises where the network fails.
    """
    from huggingface_hub import constants, hf_hub_url

    here = os.fstat(descriptor).st_size
    most = limits.UNTOLD_FILE_BYTES if file.size is None else file.size
    url = hf_hub_url(repo_of(name), file.name, revision=commit)
    begin = {"Range": f"bytes={here}-"} if here else {}
    with _asked(name, url, constants.HF_HUB_DOWNLOAD_TIMEOUT, begin) as response:
        if here and response.status_code == 200:  # it knows no ranges
            files.cut(descriptor, 0)
            count(-here)
            here = 0
        for piece in response.iter_raw(_CHUNK):
            if (here := here + len(piece)) > most:
                files.cut(descriptor, 0)
                reason = f"{file.name} is larger than the {most:,} bytes that it may have"
                raise ModelUnusable(name, reason, f"llava models pull {name}")
            files.write(descriptor, piece)
            count(len(piece))
    if file.size is not None and here < file.size:
        raise OSError(f"{here:,} of {file.size:,} bytes came")


def _own_headers() -> dict[str, str]:
    """Who asks: with the user's token, unless it is in a home that this user cannot enter."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # loaded lazily

    try:
        return build_hf_headers()
    except OSError:
        return build_hf_headers(token=False)


class _Busy(Exception):
    """The Hub asks for patience."""


@contextmanager
def _asked(name: str, url: str, timeout: float, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """What the Hub answers, its body not read yet; raises `ModelUnusable` or `OSError` where that is an error.

    Not with `hf_raise_for_status`, which reads whatever comes with an error.
    """
    from huggingface_hub import get_session

    headers = {**_own_headers(), "Accept-Encoding": "identity", **(headers or {})}
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        said = {key: response.headers.get(f"X-Error-{key}", "") for key in ("Code", "Message")}
        if said["Code"] == "GatedRepo":
            hint = f"ask at the Hub's page of {repo_of(name)}, then: hf auth login"
            raise ModelUnusable(name, "needs its owner's leave", hint)
        # It says 401, too, where there is no such model, or none for whom it does not know.
        if said["Code"] == "RepoNotFound" or (response.status_code == 401 and "credentials" not in said["Message"]):
            raise _unknown(name)
        if response.status_code not in (200, 206):
            words = f"{response.status_code} {said['Message'] or response.reason_phrase}"
            raise _Busy(words) if response.status_code in (408, 429) else OSError(words)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("what came is packed, which was not asked for")
        yield response


def _unknown(name: str) -> ModelUnusable:
    return ModelUnusable(name, "the Hub has no such model", "llava models lists what there is")
