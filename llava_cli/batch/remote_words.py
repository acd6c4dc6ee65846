"""Words of a command line that are URLs: what braces and patterns in them stand for, and what each is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from llava_cli import files, limits
from llava_cli.batch.containers.bucket import split_pattern
from llava_cli.batch.foreign_files import is_called_tar
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.cloud import Cloud
from llava_cli.images.reader import SUFFIXES, is_url
from llava_cli.images.remote_names import is_cloud_url, scheme_of, shown, without_secrets

ARCHIVE_SUFFIXES = (".zip", ".parquet", ".arrow", ".feather", ".ipc")
"""Of archives and tables, but for a tar's."""
_LIST_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")


def is_remote(word: str) -> bool:
    """Whether a word is the URL of something that we may read."""
    return is_url(word) or is_cloud_url(word)


def is_archive(url: str) -> bool:
    """Whether a URL is that of an archive or a table, by its suffix."""
    name = without_secrets(url).lower()
    return name.endswith(ARCHIVE_SUFFIXES) or is_called_tar(name)


def is_picture(url: str) -> bool:
    """Whether a URL is that of one picture, by its suffix."""
    return without_secrets(url).lower().endswith(SUFFIXES) and not _is_pattern(url)


def expand_url(word: str) -> list[str]:
    """The URLs that a word stands for.

    Braces are expanded as a shell does it, `{000..099}` and `{a,b}`, and patterns of archives in a bucket; of a data
    set its archives and tables are taken, and its pictures. Raises `InputMissing` if there are none, `UsageError` for
    too many, or for a list of pictures.
    """
    words = _within_bounds(word, _without_braces(word))
    expanded = [url for each in words for url in (_expand_cloud_url(each) if is_cloud_url(each) else [each])]
    return _within_bounds(word, iter(expanded))


def _expand_cloud_url(url: str) -> list[str]:
    if url.lower().endswith(_LIST_SUFFIXES):
        hint = f"aws s3 cp {files.quoted(url)} - | llava batch - …" if scheme_of(url) == "s3" else "download it first"
        raise UsageError(shown(url), "a list in a bucket is not read", hint)
    if _is_pattern(url) and is_archive(url):
        return _matches(url)
    if scheme_of(url) == "hf" and not is_archive(url) and not is_picture(url) and not _is_pattern(url):
        return _files_of_data_set(url.rstrip("/") + "/")
    return [url]


def _matches(pattern: str) -> list[str]:
    start, expression = split_pattern(pattern)
    assert expression  # it is a pattern
    names = (name for name, _ in Cloud(start).list(start) if expression.fullmatch(name))
    found = sorted(start + name for name in _within_bounds(pattern, names))
    if not found:
        raise InputMissing(shown(pattern), "no object has a name like that")
    return found


def _files_of_data_set(url: str) -> list[str]:
    """A data set's archives and tables; with the data set itself if it has pictures of its own, or neither."""
    archives, has_pictures = [], False
    for name, _ in Cloud(url).list(url):
        if is_archive(name):
            archives.append(url + name)
        has_pictures = has_pictures or name.lower().endswith(SUFFIXES)
    return [*([url] if has_pictures or not archives else []), *sorted(archives)]


def _is_pattern(url: str) -> bool:
    """Whether a bucket's URL has a pattern's signs; in others `?` begins a query."""
    return is_cloud_url(url) and re.search(r"[*?]", url) is not None


def _without_braces(word: str) -> Iterator[str]:
    match = _BRACES.search(word)
    if not match:
        yield word
        return
    first, last, words = match.groups()
    if words is None:
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices: Iterator[str] = (f"{n:0{width}}" for n in range(int(first), int(last) + step, step))
    else:
        choices = iter(words.split(","))
    for choice in choices:
        yield from _without_braces(word[: match.start()] + choice + word[match.end() :])


def _within_bounds(word: str, words: Iterator[str]) -> list[str]:
    """Raises `UsageError` for more than `limits.EXPANDED_SOURCES`."""
    found = list(islice(words, limits.EXPANDED_SOURCES + 1))
    if len(found) > limits.EXPANDED_SOURCES:
        raise UsageError(shown(word), f"stands for more than {limits.EXPANDED_SOURCES:,} files", "give fewer at a time")
    return found
