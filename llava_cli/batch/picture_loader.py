"""Opens the pictures of tasks ahead of need, in sandboxed processes, so that no picture can end the run."""

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
from llava_cli.images.sandbox import Crash, SandboxPool
from llava_cli.untrusted_text import printable

ATTEMPTS = 2
"""For a picture whose file is missing or whose process crashes."""
PREFETCH_PER_PROCESS = 4


class PictureLoader:
    """Opens pictures in a pool of processes.

    `locate` gives a picture's full path, or raises a `LlavaError` if it must not be opened. URLs are fetched only with
    `allow_urls`. With `max_side` pictures are scaled down to that many pixels.
    """

    def __init__(
        self,
        locate: Callable[[str], str] = os.path.abspath,
        allow_truncated: bool = False,
        allow_urls: bool = False,
        max_side: int | None = None,
    ) -> None:
        self.allow_urls = allow_urls
        self.last_refusal: LlavaError | None = None
        """What `locate` raised last."""
        self._locate = locate
        self._options: dict[str, Any] = {"allow_truncated": allow_truncated, "shrink": max_side}
        self._sandboxes = SandboxPool()
        self._process_count = len(self._sandboxes.all)
        self._threads = ThreadPoolExecutor(self._process_count)
        self._is_closed = False

    def load_all(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Picture | LlavaError]]:
        """Each task with its picture, in order; consecutive tasks about the same picture get the same object."""
        pending: deque[tuple[Task, Future[Picture | LlavaError]]] = deque()
        for task in tasks:
            is_same = bool(pending) and pending[-1][0].image == task.image
            pending.append((task, pending[-1][1] if is_same else self._threads.submit(self.load, task.image)))
            if len(pending) > self._process_count * PREFETCH_PER_PROCESS:
                first, future = pending.popleft()
                yield first, future.result()
        for task, future in pending:
            yield task, future.result()

    def load(self, image: str) -> Picture | LlavaError:
        """One picture, or why it cannot be opened."""
        if is_url(image):
            if not self.allow_urls:
                return InputMissing(printable(image), "URLs in a list are not fetched", "--allow-urls fetches them")
            path = image
        else:
            try:
                path = self._locate(image)
            except LlavaError as error:
                self.last_refusal = error
                return error
        for _ in range(ATTEMPTS):
            picture = self._decode(path)
            if isinstance(picture, Picture):
                return replace(picture, name=image)
            if self._is_closed or not isinstance(picture, (InputMissing, Crash)):
                break
        return BadImage(printable(path), picture.reason) if isinstance(picture, Crash) else picture

    def _decode(self, path: str) -> Picture | LlavaError:
        try:
            data = read(path, public=True, follow=False)  # `locate` has resolved all links: a new one is suspicious
        except LlavaError as error:
            return error
        return self._sandboxes.open(path, data, **self._options)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandboxes.close()
