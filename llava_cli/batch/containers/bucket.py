"""The pictures of a bucket or a data set, or of a folder in one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llava_cli.batch.containers.container import Entry
from llava_cli.batch.folders import Selection
from llava_cli.batch.tasks import sort_paths
from llava_cli.images.cloud import Cloud
from llava_cli.images.remote_names import shown

_WILD = re.compile(r"\*\*/?|\*|\?")
_WILD_PATTERNS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Bucket:
    """Objects below a URL, `s3://bucket/photos/`, or those that a pattern matches, `s3://bucket/2024-*/*.jpg`.

    They are taken by their names, as in a folder. Those without a picture's suffix are passed over and counted: to read
    their first bytes, as in a folder, would take a request for each.
    """

    readers = 16
    has_questions = False

    def __init__(self, url: str, include: Sequence[str] = ()) -> None:
        self._url, self._pattern = split_pattern(url)
        self._selection = Selection(include)
        self._cloud = Cloud(url)

    def entries(self) -> Iterator[Entry]:
        return map(Entry, sort_paths(self._names()))

    def _names(self) -> Iterator[str]:
        for name, size in self._cloud.list(self._url):
            is_folder = name == "" or (name.endswith("/") and not size)  # which consoles make
            if is_folder or (self._pattern and not self._pattern.fullmatch(name)):
                continue
            if self._selection.takes(name, bytes):
                yield name

    def read(self, name: str) -> bytes:
        return self._cloud.read(self._url + name, shown(name))

    def note(self) -> str:
        return self._selection.skipped.note()

    def close(self) -> None:
        self._cloud.end()


def split_pattern(url: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder that a URL names, or that all matches of its pattern are below; and the pattern of names in it.

    `*` and `?` stay within a name, `**` does not.
    """
    wild = _WILD.search(url)
    if not wild:
        return url.rstrip("/") + "/", None
    start = url[: wild.start()].rpartition("/")[0] + "/"
    parts = re.split(f"({_WILD.pattern})", url[len(start) :])
    return start, re.compile("".join(_WILD_PATTERNS.get(part) or re.escape(part) for part in parts), re.DOTALL)
