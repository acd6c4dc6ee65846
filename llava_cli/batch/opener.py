"""Opens pictures ahead of need in processes of their own, so that none of them can take the run down."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError, printable
from llava_cli.images import is_url
from llava_cli.sandbox import Crash, Sandboxes

ATTEMPTS = 2
AHEAD = 4
"""Pictures of each process that are kept ready."""


class Opener:
    """`root` is where relative paths begin; `urls` are opened only where that is allowed.

    With `shrink` pictures come no larger than that many pixels a side.
    """

    def __init__(
        self, root: str = "", allow_truncated: bool = False, allow_urls: bool = False, shrink: int | None = None
    ) -> None:
        self.root, self.allow_urls = root, allow_urls
        self._options: dict[str, Any] = {"allow_truncated": allow_truncated, "public": True, "shrink": shrink}
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
            path = os.path.join(self.root, image)
            path = f"./{path}" if path == "-" else path  # a file of that name: stdin is no picture here
        for _ in range(ATTEMPTS):
            found = self._sandboxes.open(path, **self._options)
            if isinstance(found, Picture):
                return replace(found, name=image)
            if self._closed or not isinstance(found, (InputMissing, Crash)):
                break
        return BadImage(printable(path), found.reason) if isinstance(found, Crash) else found

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandboxes.close()
