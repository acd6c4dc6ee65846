"""Reads an iterable ahead of need, in a thread: pictures are prepared while the model runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Ahead(Generic[T]):
    """Up to `depth` items of an iterable, taken out of it before they are asked for.

    An error of the iterable's is raised where its next item would have been.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._closed = False
        self._error: BaseException | None = None
        self.ended = False
        """Whether the last item has been taken."""
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def get(self, wait: float) -> T | None:
        """The next item; None where there is none for `wait` seconds, or no more."""
        if self.ended:
            return None
        try:
            item = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
        except queue.Empty:
            return None
        if item is not _END:
            return item  # type: ignore[return-value]
        self.ended = True
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Takes no more items than the one that the thread may be waiting for."""
        self._closed = True
        while not self._queue.empty():
            self._queue.get_nowait()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._queue.put(item)
                if self._closed:
                    return
        except BaseException as error:  # also a KeyboardInterrupt belongs where the items go
            self._error = error
        finally:
            self._queue.put(_END)
