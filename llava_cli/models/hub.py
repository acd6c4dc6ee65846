"""Requests to the Hugging Face Hub: the list of a model's files, and their bytes.

Nothing that the Hub says is trusted: a commit, hash or name becomes part of a path only if it is well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from llava_cli import bounded_json, limits
from llava_cli.errors import ModelUnusable
from llava_cli.models.aliases import repo_of
from llava_cli.models.registry import is_commit
from llava_cli.untrusted_text import one_line

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Weights in safetensors and what it takes to use them; never pickles, never code."""
_WINDOWS_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL
)
"""Names that Windows reserves for devices, with any suffix."""


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it, checked so that it can become part of a path."""

    name: str
    size: int | None
    """In bytes; None for a mirror that lists only names."""
    hash: str | None
    """SHA-256 of a large file (Git LFS), git's blob hash of a small one; None for a mirror that lists only names."""
    is_lfs: bool


class HubBusy(Exception):
    """The Hub asks to try again later."""


def list_files(name: str) -> tuple[str, list[HubFile]]:
    """The current commit of a model, and the files that make up its checkpoint, the weights last.

    Raises `ModelUnusable`, or what `request` raises.
    """
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
    with request(name, url, constants.HF_HUB_ETAG_TIMEOUT) as response:
        for piece in response.iter_raw():
            data += piece
            if len(data) > bounds.bytes:
                break
    try:
        info = bounded_json.loads(bytes(data), bounds)
    except bounded_json.TooMuch as error:
        raise ModelUnusable(name, f"the Hub's list of its files is {error}") from None
    commit, siblings = (info.get("sha"), info.get("siblings")) if isinstance(info, dict) else (None, None)
    if not isinstance(siblings, list):
        raise ModelUnusable(name, "the Hub does not list its files")
    if not isinstance(commit, str) or not is_commit(commit):
        raise ModelUnusable(name, f"the Hub gives no commit for it, but {_shown(commit)}")
    files = [_checked(name, entry) for entry in siblings if _is_needed(entry)]
    return commit, sorted(files, key=lambda file: file.name.endswith(".safetensors"))


def _is_needed(entry: Any) -> bool:
    """Whether an entry is a file of the checkpoint: folders hold other formats, "consolidated" weights are copies."""
    path = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(path, str) or "/" in path or path.startswith("consolidated"):
        return False
    return any(fnmatch(path, pattern) for pattern in _FILES)


def _checked(name: str, entry: dict[str, Any]) -> HubFile:
    """The file that an entry describes. Raises `ModelUnusable` if its name, size or hash is malformed."""
    path, size, lfs = entry["rfilename"], entry.get("size"), entry.get("lfs")
    digest, length = (lfs.get("sha256"), 64) if isinstance(lfs, dict) else (entry.get("blobId"), 40)
    if not _is_file_name(path):
        raise ModelUnusable(name, f"{_shown(path)} is not a file name")
    if size is not None and (type(size) is not int or not 0 <= size <= limits.HUB_FILE_BYTES):
        raise ModelUnusable(name, f"{path} cannot have {_shown(size)} bytes")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)):
        raise ModelUnusable(name, f"{path} has no such hash as {_shown(digest)}")
    return HubFile(path, size, digest if size is not None else None, isinstance(lfs, dict))


def _is_file_name(name: str) -> bool:
    """Whether a name is that of one file on every system, and nothing else."""
    if not 0 < len(name) <= limits.NAME_CHARACTERS or name.startswith(".") or not name.isprintable():
        return False
    return not any(character in name for character in "/\\:") and not _WINDOWS_DEVICES.fullmatch(name)


def _shown(value: Any) -> str:
    """A value from the Hub, shortened for a message."""
    return repr(one_line(value, 60) if isinstance(value, str) else value)[:80]


@contextmanager
def request(name: str, url: str, timeout: float, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The Hub's response, before its body is read.

    Raises `ModelUnusable`, `HubBusy` or `OSError` for an error; not by `hf_raise_for_status`, which reads bodies of any
    length.
    """
    from huggingface_hub import get_session

    headers = {**_user_headers(), "Accept-Encoding": "identity", **(headers or {})}
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        code, message = (response.headers.get(f"X-Error-{key}", "") for key in ("Code", "Message"))
        if code == "GatedRepo":
            hint = f"ask at the Hub's page of {repo_of(name)}, then: hf auth login"
            raise ModelUnusable(name, "needs its owner's permission", hint)
        # A missing or private model also gives 401 to users that are not logged in.
        if code == "RepoNotFound" or (response.status_code == 401 and "credentials" not in message):
            raise _unknown(name)
        if response.status_code not in (200, 206):
            words = f"{response.status_code} {message or response.reason_phrase}"
            raise HubBusy(words) if response.status_code in (408, 429) else OSError(words)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("the response is compressed, which was not requested")
        yield response


def _user_headers() -> dict[str, str]:
    """huggingface_hub's headers, with the user's token unless it is in a home that this user cannot enter."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # loaded lazily

    try:
        return build_hf_headers()
    except OSError:
        return build_hf_headers(token=False)


def _unknown(name: str) -> ModelUnusable:
    return ModelUnusable(name, "the Hub has no such model", "llava models lists what there is")
