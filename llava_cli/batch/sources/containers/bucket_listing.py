"""Lists the objects of a bucket; the pages of a large one in several threads, each of which reads a range of keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Condition, Thread

from llava_cli.batch.scratch import Spool, scratch_spool
from llava_cli.batch.sources.containers.key_ranges import KeyRange, KeyRanges, Unordered
from llava_cli.errors import InputMissing
from llava_cli.images.cloud import Cloud, Object, Page

_THREADS = 8
_END_SECONDS = 2
"""How long Ctrl-C waits for requests that are under way."""


def list_objects(cloud: Cloud, url: str) -> Iterator[Object]:
    """All objects whose URL begins with this one, which ends with `/`.

    They are in the order of their names' bytes if a server of S3 lists them so, else in no order. Raises
    `InputMissing`, and `OutputError` where there is no room for what the threads have read.
    """
    if not cloud.has_pages:
        yield from cloud.list(url)
        return
    first = cloud.page(url)
    if first.token is None:
        yield from first.objects
        return
    with scratch_spool() as spool, suppress(Unordered):
        listing = _Listing(cloud, url, spool)
        listing.read(first)
        yield from listing.objects()
        return
    yield from cloud.list(url)


class _Listing:
    """The pages of all ranges of a bucket, on disk."""

    def __init__(self, cloud: Cloud, url: str, spool: Spool) -> None:
        self._cloud, self._url, self._spool = cloud, url, spool
        self._ranges = KeyRanges()
        self._changed = Condition()
        """Guards the ranges and the error."""
        self._error: BaseException | None = None

    def read(self, first: Page) -> None:
        """Reads all pages behind the first one. Raises `Unordered`, `InputMissing` or `OutputError`."""
        below = self._ranges.all[0]
        self._take(below, first)
        above = self._ranges.split()
        if above is None:
            raise Unordered
        self._take(above, self._page_after(above))
        parts = (below, above, *[None] * (_THREADS - 2))
        threads = [Thread(target=self._work, args=(part,), name="bucket listing", daemon=True) for part in parts]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self._fail(error)
            end = time.monotonic() + _END_SECONDS
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0, end - time.monotonic()))
            raise
        if self._error:
            raise self._error

    def objects(self) -> Iterator[Object]:
        for part in self._ranges.all:
            for place in part.places:
                yield from (Object(*item) for item in self._spool.read(place))

    def _page_after(self, part: KeyRange) -> Page:
        """A range's first page, the first one that does not begin where the bucket does.

        Raises `Unordered` if the server refuses that, as for directory buckets; if it refuses all, that is said later.
        """
        try:
            return self._cloud.page(self._url, part.start)
        except InputMissing:
            raise Unordered from None

    def _work(self, part: KeyRange | None) -> None:
        """Reads one range after the other, until nothing is left of any."""
        try:
            part = part or self._claim()
            while part:
                while not part.is_done and not self._error:
                    self._take(part, self._cloud.page(self._url, part.start, part.token))
                part = self._claim()
        except BaseException as error:
            self._fail(error)

    def _claim(self) -> KeyRange | None:
        """Waits for a part of another thread's range; `None` if all is read, or nothing else is to be."""
        with self._changed:
            while self._ranges.active and not self._error:
                if part := self._ranges.split():
                    return part
                self._changed.wait()
        return None

    def _take(self, part: KeyRange, page: Page) -> None:
        with self._changed:
            if self._error:
                return
            count = self._ranges.add(part, [name for name, _ in page.objects], page.token)
            self._changed.notify_all()
        if count:
            part.places.append(self._spool.add(page.objects[:count]))

    def _fail(self, error: BaseException) -> None:
        """Ends all threads with the first error, and their attempts that wait."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        if not isinstance(error, Unordered):
            self._cloud.end()
