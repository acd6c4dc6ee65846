"""Answers many requests at once, each in a thread that waits for a server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from llava_cli.engine.base import Answer, Request
from llava_cli.errors import LlavaError

MAX_BEHIND = 960
"""Requests that are taken after one that is not answered yet: a batch does not give any number of them before that."""


def answer_in_threads(
    numbered: Iterator[tuple[int, Request | LlavaError]],
    answer: Callable[[Request], Answer],
    size: int,
    go_on: Callable[[], bool],
) -> Iterator[tuple[int, Request | None, Answer | Exception]]:
    """Answers numbered requests in `size` threads and yields (number, request, outcome) as each one finishes.

    A `LlavaError` in a request's place is passed on, with None as its request. Once `go_on()` is false, no more
    requests are taken, nor while one lags `MAX_BEHIND` behind. The threads are daemons and are not joined: a caller
    that gives up must not have to wait for a server's answer.
    """
    inbox: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
    outbox: queue.SimpleQueue[tuple[int, Request, Answer | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while item := inbox.get():
            try:
                outbox.put((*item, answer(item[1])))
            except Exception as error:
                outbox.put((*item, error))

    for _ in range(size):
        threading.Thread(target=work, daemon=True).start()
    running, last, has_more = set[int](), -1, True
    try:
        while running or has_more:
            while has_more and len(running) < size and last - min(running, default=last) < MAX_BEHIND:
                item = next(numbered, None) if go_on() else None
                last = item[0] if item else last
                if item is None:
                    has_more = False
                elif isinstance(item[1], LlavaError):
                    yield item[0], None, item[1]
                else:
                    inbox.put((item[0], item[1]))
                    running.add(item[0])
            if running:
                finished = outbox.get()
                running.remove(finished[0])
                yield finished
    finally:
        for _ in range(size):
            inbox.put(None)
