"""Reads objects of buckets and files of data sets by URL (`s3://bucket/a.jpg`), through fsspec's file systems.

The package for a scheme is imported once such a URL is given. It finds credentials and endpoints as it does elsewhere:
in variables, profiles and the files of its own command.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from llava_cli import limits
from llava_cli.errors import UsageError
from llava_cli.images.local_file import too_large
from llava_cli.images.remote_errors import Patience, status_of
from llava_cli.images.remote_names import path_of, scheme_of, shown

EXTRA = "pip install 'llava-cli[cloud]'"
CONNECTIONS = 32
"""At a time to one service."""
PAGE_KEYS = 1000
"""Objects of an S3 bucket that are listed at a time, which is the most that a server gives."""
_BLOCK_BYTES = 8_000_000
"""Of an archive that is read at once."""
_BUFFER_BYTES = 1 << 17
_CONNECT_SECONDS = 10
_S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": _CONNECT_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "read_timeout": limits.REMOTE_STALL_SECONDS,
    }
}


class Service(NamedTuple):
    """What answers to a scheme."""

    protocol: str
    """fsspec's name for it."""
    package: str
    sign_in: str
    """The command that finds credentials."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Of fsspec's file system."""


_S3_SIGN_IN = "aws configure, or export AWS_PROFILE=NAME; for a public bucket: export FSSPEC_S3_ANON=true"
_S3 = Service("s3", "s3fs", _S3_SIGN_IN, _S3_OPTIONS)
_GOOGLE_SIGN_IN = "gcloud auth application-default login; for a public bucket: export FSSPEC_GS_TOKEN=anon"
_GOOGLE = Service("gs", "gcsfs", _GOOGLE_SIGN_IN)
_AZURE = Service("abfs", "adlfs", "az login, and export AZURE_STORAGE_ACCOUNT_NAME=NAME")
_HUB = Service("hf", "huggingface_hub", "hf auth login, or export HF_TOKEN=…")
SERVICES = {"s3": _S3, "gs": _GOOGLE, "gcs": _GOOGLE, "az": _AZURE, "abfs": _AZURE, "hf": _HUB}
"""By the scheme of a URL."""


def service_of(url: str) -> Service:
    """What answers to a URL. Raises `UsageError` if the package for its scheme is not installed."""
    service = SERVICES[scheme_of(url)]
    if importlib.util.find_spec(service.package) is None:
        raise UsageError(shown(url), f"needs {service.package}, which is not installed", EXTRA)
    return service


class Object(NamedTuple):
    """Something that is listed."""

    name: str
    """Relative to what was listed, with `/` between its parts."""
    size: int | None


class Page(NamedTuple):
    """Some of what is listed."""

    objects: list[Object]
    token: str | None
    """Of the next page; `None` if this is the last one."""


class Cloud:
    """The objects of one service; for any number of threads."""

    def __init__(self, url: str) -> None:
        """`url` is what messages call it. Raises `UsageError` if the package for its scheme is not installed."""
        service = service_of(url)
        self.has_pages = service is _S3
        """Whether it can be listed from any name on, by `page`."""
        self._files = file_system(service.protocol)
        self._patience = Patience(shown(url), service.sign_in)

    def list(self, url: str) -> Iterator[Object]:
        """All objects whose URL begins with this one, which ends with `/`; in no order. Raises `InputMissing`.

        One page or folder is in memory at a time.
        """
        if not self.has_pages:
            yield from _folders(self._files, path_of(url), self._patience.call)
            return
        page = self.page(url)
        yield from page.objects
        while page.token is not None:
            page = self.page(url, token=page.token)
            yield from page.objects

    def page(self, url: str, after: str | None = None, token: str | None = None) -> Page:
        """At most `PAGE_KEYS` of the objects that `list` gives: the first ones, those whose names come after one, or
        those that follow on the page which had this token. S3 lists names in the order of their bytes, but for its
        directory buckets and some other servers. Raises `InputMissing`.
        """
        bucket, prefix, _ = self._files.split_path(path_of(url))
        begin = {"ContinuationToken": token} if token is not None else {"StartAfter": prefix + after} if after else {}
        options = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **begin}

        def get() -> Page:
            answer = self._files.call_s3("list_objects_v2", **options)
            objects = [Object(item["Key"][len(prefix) :], item["Size"]) for item in answer.get("Contents", ())]
            return Page(objects, answer["NextContinuationToken"] if answer["IsTruncated"] else None)

        return self._patience.call(get)

    def read(self, url: str, thing: str = "") -> bytes:
        """An object's bytes, all of the same version of it, at most `limits.PICTURE_BYTES`.

        Raises `InputMissing` about `thing`, or about all if that is the only object; `SourceLost` if no other can be
        read either, `BadImage` for one that is too large.
        """
        path = path_of(url)

        data = self._patience.call(lambda: read_bytes(self._files, path, limits.PICTURE_BYTES + 1), thing)
        if len(data) > limits.PICTURE_BYTES:
            raise too_large(thing or url)
        return data

    def open(self, url: str, is_forward: bool) -> tuple[BinaryIO, object]:
        """An object, and what tells its versions apart; with `is_forward` it is read from beginning to end only.

        Raises `InputMissing`; its own methods raise `SourceLost`.
        """
        path = path_of(url)
        # Reading ahead would load what stands between the members of an archive as well.
        options = {"block_size": _BLOCK_BYTES, "cache_type": "readahead" if is_forward else "none"}
        file = self._patience.call(lambda: self._files.open(path, "rb", **options))
        details = getattr(file, "details", None) or {}
        tags = [details[key] for key in ("ETag", "etag", "md5Hash", "blob_id") if key in details]
        raw = _CloudFile(file, self._patience, is_forward)
        return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES)), (details.get("size"), *tags)

    def end(self) -> None:
        """Ends attempts that wait."""
        self._patience.end()


_RANGE_NOT_SATISFIABLE = 416


def read_bytes(files: Any, path: str, most: int | None = None) -> bytes:
    """An object's first bytes by fsspec's `files`; None is all of them.

    It is one request, so that an object which changes meanwhile is the old or the new one.
    """
    try:
        return bytes(files.cat_file(path, start=0, end=most))  # without a start, s3fs asks for the size first
    except Exception as error:
        if status_of(error) == _RANGE_NOT_SATISFIABLE:  # no byte is in an empty object
            return b""
        raise


@lru_cache
def file_system(protocol: str, attempts: int = 1) -> Any:
    """fsspec's file system, with one connection pool for the whole process.

    Its requests are tried so many times where it is S3's; `Patience` tries whole calls again.
    """
    import fsspec

    options = dict(next(service.options for service in SERVICES.values() if service.protocol == protocol))
    if protocol == "s3":
        config = {**options["config_kwargs"], "retries": {"mode": "standard", "total_max_attempts": attempts}}
        options |= {"config_kwargs": config, "session": _s3_session(fsspec.config.conf.get("s3", {}).get("profile"))}
    files = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
    if protocol == "s3":
        files.retries = 1
    return files


def _s3_session(profile: str | None) -> Any:
    """One that leaves dates as they are: to parse them is most of the work of a listing, and nothing here needs them.

    fsspec's settings may name a profile; `None` leaves it to those of AWS.
    """
    from aiobotocore.session import AioSession

    session = AioSession(profile=profile)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return session


class _CloudFile(io.RawIOBase):
    """fsspec's file, whose reads are tried again: one that fails has not moved the position."""

    def __init__(self, file: Any, patience: Patience, is_forward: bool) -> None:
        self._file, self._patience, self._is_forward = file, patience, is_forward

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._is_forward

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        data = self._patience.call(lambda: self._file.read(len(buffer)), is_in_use=True)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


Ask = Callable[[Callable[[], Any]], Any]


def _folders(files: Any, path: str, ask: Ask) -> Iterator[Object]:
    """Folder by folder, of which one is in memory at a time."""
    top = path.rstrip("/")
    folders = [top]
    while folders:
        folder = folders.pop()
        for item in ask(lambda: files.ls(folder, detail=True)):  # noqa: B023
            name = item["name"].rstrip("/")
            if item["type"] == "directory" and name != folder:
                folders.append(name)
            elif item["type"] == "file":
                yield Object(name[len(top) + 1 :], item.get("size"))
