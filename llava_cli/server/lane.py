"""Work in threads, so much of each kind at a time: what is slow of one kind does not keep another from its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Lane:
    """So many pieces of work at a time, in order.

    What is canceled while it waits is never begun, and lets go of all it holds; later it keeps its place until its
    thread has ended, or whoever asks and leaves at once could have any number of them.
    """

    def __init__(self, places: int) -> None:
        self._free = asyncio.Semaphore(places)

    async def run(self, work: Callable[[], T], unwanted: Callable[[T], None] | None = None) -> T:
        """What `work` returns or raises; `unwanted` gets it where nobody waits any more."""
        await self._free.acquire()
        running = asyncio.ensure_future(to_thread.run_sync(work, limiter=CapacityLimiter(1)))  # not the pool's 40
        running.add_done_callback(self._end)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if unwanted is not None:
                running.add_done_callback(lambda ended: None if _failed(ended) else unwanted(ended.result()))
            raise

    def _end(self, ended: asyncio.Future[Any]) -> None:
        self._free.release()
        _failed(ended)  # asked for, or asyncio would complain where nobody waits any more


def _failed(ended: asyncio.Future[Any]) -> bool:
    return ended.cancelled() or ended.exception() is not None
