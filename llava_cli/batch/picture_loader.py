"""Opens the pictures of tasks ahead of need, in sandboxed processes, so that no picture can end the run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError, SourceLost
from llava_cli.images.reader import is_url, read
from llava_cli.images.region import cut
from llava_cli.images.resize import Resize
from llava_cli.images.sandbox import Crash, SandboxPool
from llava_cli.settings import PictureOptions
from llava_cli.untrusted_text import printable

Item = TypeVar("Item")
Work = TypeVar("Work")
ATTEMPTS = 2
"""For a picture whose file is missing or whose process crashes."""
PREFETCH_PER_PROCESS, MAX_PREFETCH = 4, 16
"""Pictures that are decoded ahead: some have 150 MB."""


class PictureLoader:
    """Opens pictures in a pool of processes.

    `find` gives a picture's file: its bytes, or its path on this disk. It raises a `LlavaError` if there is none, or if
    it must not be opened, and is called by `readers` threads, in the order of the tasks where that is one. URLs that it
    does not hold, as `holds` says, are fetched only with `allow_urls`. With `keep_files` pictures come with their
    files. `processes` is how many decode; None for as many as suit this machine.
    """

    def __init__(
        self,
        find: Callable[[str], bytes | Path] = lambda image: Path(os.path.abspath(image)),
        allow_truncated: bool = False,
        allow_urls: bool = False,
        dpi: int = PictureOptions.dpi,
        readers: int = 4,
        holds: Callable[[str], bool] = lambda image: False,
        keep_files: bool = False,
        processes: int | None = None,
    ) -> None:
        self.allow_urls = allow_urls
        self.last_refusal: LlavaError | None = None
        """What `find` raised last."""
        self._find, self._holds, self._keep_files = find, holds, keep_files
        self._options: dict[str, Any] = {"allow_truncated": allow_truncated, "dpi": dpi}
        self._sandboxes = SandboxPool(count=processes)
        self._process_count = len(self._sandboxes.all)
        self._readers, self._decoders = ThreadPoolExecutor(readers), ThreadPoolExecutor(self._process_count)
        self._files_ahead = max(readers, 4)
        self._pictures_ahead = min(self._process_count * PREFETCH_PER_PROCESS, MAX_PREFETCH)
        self._is_closed = False

    def load_all(
        self, tasks: Iterable[Task], resize: Resize | None = None
    ) -> Iterator[tuple[Task, Picture | LlavaError]]:
        """Each task with its picture, in order; consecutive tasks about the same picture get the same object.

        Regions are not resized. Raises `SourceLost`.
        """

        def begin_decoding(read: tuple[Task, Future[bytes | Path | LlavaError]]) -> Future[Picture | LlavaError]:
            task, file = read
            return self._decoders.submit(lambda: self._decode(task, file.result(), resize))

        files = _ahead(tasks, lambda task: task.image, self._begin_reading, self._files_ahead)
        pictures = _ahead(files, lambda read: _about(read[0]), begin_decoding, self._pictures_ahead)
        for (task, _), picture in pictures:
            yield task, picture.result()

    def _begin_reading(self, task: Task) -> Future[bytes | Path | LlavaError]:
        return self._readers.submit(self._read, task.image)

    def load(self, task: Task, resize: Resize | None = None) -> Picture | LlavaError:
        """One picture, as of `load_all`, or why it cannot be opened."""
        return self._decode(task, self._read(task.image), resize)

    def _read(self, image: str) -> bytes | Path | LlavaError:
        if is_url(image) and not self._holds(image):
            if not self.allow_urls:
                return InputMissing(printable(image), "URLs in a list are not fetched", "--allow-urls fetches them")
            return _retried(lambda: read(image, public=True))
        if is_url(image):
            return _retried(lambda: self._find(image))
        try:
            return self._find(image)
        except SourceLost:
            raise
        except LlavaError as error:
            self.last_refusal = error
            return error

    def _decode(self, task: Task, file: bytes | Path | LlavaError, resize: Resize | None) -> Picture | LlavaError:
        if isinstance(file, LlavaError):
            return file
        resize = None if task.region else resize  # it may be in pixels
        name = str(file) if isinstance(file, Path) else task.image
        for _ in range(ATTEMPTS):
            picture = self._sandboxes.open(name, file, resize=resize, part=task.part, **self._options)
            if isinstance(picture, Picture):
                picture = replace(picture, name=task.image, file=file if self._keep_files else None)
                return cut(picture, task.region) if task.region else picture
            if self._is_closed or not isinstance(picture, (InputMissing, Crash)):
                break
        return BadImage(printable(name), picture.reason) if isinstance(picture, Crash) else picture

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._is_closed = True
        for threads in (self._readers, self._decoders):
            threads.shutdown(wait=False, cancel_futures=True)
        self._sandboxes.close()


def _ahead(
    items: Iterable[Item], about: Callable[[Item], object], begin: Callable[[Item], Work], window: int
) -> Iterator[tuple[Item, Work]]:
    """Each item with its work, in order; work begins up to `window` items ahead, once for neighbors about the same."""
    pending: deque[tuple[Item, Work]] = deque()
    for item in items:
        is_same = bool(pending) and about(pending[-1][0]) == about(item)
        pending.append((item, pending[-1][1] if is_same else begin(item)))
        if len(pending) > window:
            yield pending.popleft()
    yield from pending


def _about(task: Task) -> tuple[object, ...]:
    """What two tasks have in common that are about the same picture."""
    return task.image, task.part, task.region


def _retried(fetch: Callable[[], bytes | Path]) -> bytes | Path | LlavaError:
    """What `fetch` returns, or the error that it raises each time."""
    error: LlavaError
    for _ in range(ATTEMPTS):
        try:
            return fetch()
        except SourceLost:
            raise
        except LlavaError as problem:
            error = problem
            if not isinstance(problem, InputMissing):
                break
    return error
