"""Work in threads, with a limit for each kind of work, so that slow work of one kind does not block another kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class WorkerLane:
    """Runs at most `size` functions at a time in threads, in the order in which they come.

    A call that is canceled while it waits never runs. One that is canceled later occupies its place until its thread
    ends: otherwise clients that ask and leave at once could have any number of threads.
    """

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)

    async def run(self, work: Callable[[], T], discard: Callable[[T], None] | None = None) -> T:
        """Returns or raises what `work` does; if the caller is canceled meanwhile, `discard` gets the result."""
        await self._free.acquire()
        running = asyncio.ensure_future(to_thread.run_sync(work, limiter=CapacityLimiter(1)))  # not anyio's shared 40
        running.add_done_callback(self._release)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if discard is not None:
                running.add_done_callback(lambda done: None if _has_failed(done) else discard(done.result()))
            raise

    def _release(self, done: asyncio.Future[Any]) -> None:
        self._free.release()
        _has_failed(done)  # retrieves the exception, or asyncio would log that nobody did


def _has_failed(done: asyncio.Future[Any]) -> bool:
    return done.cancelled() or done.exception() is not None
