"""Words of a command line that are URLs: what patterns in them stand for, and what each is."""

from __future__ import annotations

from collections.abc import Iterator

from llava_cli import files, limits
from llava_cli.batch.sources.containers.bucket import split_pattern
from llava_cli.batch.sources.containers.bucket_listing import list_objects
from llava_cli.batch.sources.containers.remote_file import is_archive, is_pattern, is_picture_url
from llava_cli.batch.tasks import sort_paths
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.cloud import Cloud
from llava_cli.images.reader import SUFFIXES
from llava_cli.images.remote_names import is_cloud_url, path_of, scheme_of, shown

_LIST_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


def expand_url(url: str) -> list[str]:
    """The URLs that a word stands for.

    A pattern of archives or tables in a bucket stands for those that it matches, a data set for its archives and
    tables, and for its pictures if it has any. Raises `InputMissing` if nothing matches, `UsageError` for too many, or
    for a list.
    """
    if not is_cloud_url(url):
        return [url]
    if not path_of(url).strip("/"):
        raise UsageError(shown(url), "names no bucket", f"llava batch {scheme_of(url)}://BUCKET/FOLDER/ QUESTION")
    if url.lower().endswith(_LIST_SUFFIXES):
        hint = f"aws s3 cp {files.quoted(url)} - | llava batch - …" if scheme_of(url) == "s3" else "download it first"
        raise UsageError(shown(url), "a list in a bucket is not read", hint)
    if is_pattern(url) and is_archive(url):
        return _matches(url)
    if scheme_of(url) == "hf" and not is_archive(url) and not is_picture_url(url) and not is_pattern(url):
        return _files_of_data_set(url.rstrip("/") + "/")
    return [url]


def _matches(pattern: str) -> list[str]:
    start, expression = split_pattern(pattern)
    assert expression  # it is a pattern
    found = [start + name for name in _listed(start) if expression.fullmatch(name)]
    if not found:
        raise InputMissing(shown(pattern), "no object has a name like that")
    return found


def _files_of_data_set(url: str) -> list[str]:
    """A data set's archives and tables; also the data set itself if it has pictures beside them, or nothing."""
    archives, has_pictures = [], False
    for name in _listed(url):
        if is_archive(name):
            archives.append(url + name)
        has_pictures = has_pictures or name.lower().endswith(SUFFIXES)
    return archives if archives and not has_pictures else [url, *archives]


def _listed(url: str) -> Iterator[str]:
    """The names of all archives and pictures below a URL, in their order. Raises `UsageError` for too many archives."""
    archives = 0
    for name in sort_paths(name for name, _ in list_objects(Cloud(url), url)):
        archives += is_archive(name)
        if archives > limits.EXPANDED_WORDS:
            raise UsageError(shown(url), f"more than {limits.EXPANDED_WORDS:,} archives", "name fewer of them")
        yield name
