"""Opens pictures ahead of need in processes of their own, so that none of them can take the run down."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, cast

from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError, printable
from llava_cli.images import is_url

ATTEMPTS = 2
SECONDS = 120.0
"""That one picture may take in all, for a disk or a network may hang as well."""
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
        self._options = {"allow_truncated": allow_truncated, "public": True, "shrink": shrink}
        self._count = max(1, min(4, os.cpu_count() or 1))
        self._threads = ThreadPoolExecutor(self._count)
        self._own = threading.local()
        self._workers: list[_Worker] = []
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
            found = self._worker().open(path, self._options)
            if isinstance(found, Picture):
                return replace(found, name=image)
            if self._closed or not isinstance(found, (InputMissing, _Crash)):
                break
        return BadImage(printable(path), found.reason) if isinstance(found, _Crash) else found

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def _worker(self) -> _Worker:
        if not hasattr(self._own, "worker"):
            self._own.worker = _Worker()
            self._workers.append(self._own.worker)
        worker: _Worker = self._own.worker
        return worker


class _Crash(LlavaError):
    """A picture took its process down."""


class _Worker:
    """One process at a time; after a crash the next picture gets a new one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def open(self, path: str, options: dict[str, Any]) -> Picture | LlavaError:
        from PIL import Image

        try:
            pipe = self._start()
            pipe.send((path, options))
            if not pipe.poll(SECONDS):
                self.end()
                return BadImage(printable(path), f"took longer than {SECONDS:.0f} s")
            answer: tuple[Any, ...] = pipe.recv()
        except (EOFError, OSError):
            self.end()
            return _Crash(printable(path), "crashes its decoder")
        if isinstance(answer[0], Picture):
            picture, size, pixels = answer
            return replace(cast("Picture", picture), image=Image.frombytes("RGB", size, pixels))
        kind, *words = answer
        return cast("LlavaError", kind(*words))

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            with suppress(OSError):
                self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            command = [sys.executable, "-m", "llava_cli.batch.worker", str(theirs.fileno())]
            # In a session of its own: what a terminal sends (Ctrl-C) is for us to deal with.
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
            theirs.close()
        return self._pipe
