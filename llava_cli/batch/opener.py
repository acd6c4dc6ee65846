"""Opens pictures ahead of need in processes of their own, so that none of them can take the run down."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError
from llava_cli.images.reader import is_url, read
from llava_cli.images.sandbox import Crash, Sandboxes
from llava_cli.untrusted_text import printable

ATTEMPTS = 2
AHEAD = 4
"""Pictures of each process that are kept ready."""


class Opener:
    """`locate` gives the full path of a picture, or raises where it may not be opened; URLs are opened only if allowed.

    With `shrink` pictures come no larger than that many pixels a side.
    """

    def __init__(
        self,
        locate: Callable[[str], str] = os.path.abspath,
        allow_truncated: bool = False,
        allow_urls: bool = False,
        shrink: int | None = None,
    ) -> None:
        self.allow_urls = allow_urls
        self.refused: LlavaError | None = None
        """What `locate` said last."""
        self._locate = locate
        self._options: dict[str, Any] = {"allow_truncated": allow_truncated, "shrink": shrink}
        self._sandboxes = Sandboxes()
        self._count = len(self._sandboxes.all)
        self._threads = ThreadPoolExecutor(self._count)
        self._closed = False

    def opened(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Picture | LlavaError]]:
        """The tasks in order, each with its picture: the same object for all that follow each other about one."""
        ready: deque[tuple[Task, Future[Picture | LlavaError]]] = deque()
        for task in tasks:
            same = bool(ready) and ready[-1][0].image == task.image
            ready.append((task, ready[-1][1] if same else self._threads.submit(self.open, task.image)))
            if len(ready) > self._count * AHEAD:
                first, future = ready.popleft()
                yield first, future.result()
        for task, future in ready:
            yield task, future.result()

    def open(self, image: str) -> Picture | LlavaError:
        """One picture, or what is wrong with it; in the calling thread's own process."""
        if is_url(image):
            if not self.allow_urls:
                return InputMissing(printable(image), "URLs in a list are not fetched", "--allow-urls fetches them")
            path = image
        else:
            try:
                path = self._locate(image)
            except LlavaError as error:
                self.refused = error
                return error
        for _ in range(ATTEMPTS):
            found = self._decoded(path)
            if isinstance(found, Picture):
                return replace(found, name=image)
            if self._closed or not isinstance(found, (InputMissing, Crash)):
                break
        return BadImage(printable(path), found.reason) if isinstance(found, Crash) else found

    def _decoded(self, path: str) -> Picture | LlavaError:
        try:
            data = read(path, public=True, follow=False)  # `locate` has resolved it: a link is there since
        except LlavaError as error:
            return error
        return self._sandboxes.open(path, data, **self._options)

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandboxes.close()
