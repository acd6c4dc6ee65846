"""Takes items of an iterable in a thread before they are needed: pictures are prepared while the model runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Takes up to `depth` items of an iterable ahead.

    An error of the iterable is raised where its next item would have been.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._is_closed = False
        self._error: BaseException | None = None
        self.is_exhausted = False
        """Whether the last item has been taken."""
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def get(self, timeout: float) -> T | None:
        """The next item; None if there is none within `timeout` seconds, or at all."""
        if self.is_exhausted:
            return None
        try:
            item = self._queue.get(timeout=timeout) if timeout else self._queue.get_nowait()
        except queue.Empty:
            return None
        if item is not _END:
            return item  # type: ignore[return-value]
        self.is_exhausted = True
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Takes no more items than the one that the thread may be waiting for."""
        self._is_closed = True
        while not self._queue.empty():
            self._queue.get_nowait()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._queue.put(item)
                if self._is_closed:
                    return
        except BaseException as error:  # also a KeyboardInterrupt belongs where the items go
            self._error = error
        finally:
            self._queue.put(_END)
